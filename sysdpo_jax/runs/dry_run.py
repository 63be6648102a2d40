"""What a run would do, without doing it: the graph, sizes, memory, the first batch decoded, and the loss at step 0."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import sysdpo_jax as sj
from sysdpo_jax.components.routed import only_runs
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.report import to_image
from sysdpo_jax.runs.run import Run, first_batch
from sysdpo_jax.training.state import partition
from sysdpo_jax.training.trainer import BatchSource
from sysdpo_jax.typing import Features, Params

# Rows of the batch that are shown, and numbers of a row that is no text or image.
SHOWN, NUMBERS = 2, 8


def describe_run(run: Run, batches: BatchSource, folder: Path) -> Iterator[str]:
    """The report, a part at a time; images of the batch are written to the folder. Nothing is trained."""
    yield run.system.describe()
    mask = run.optimizer.mask(run.system, run.params)
    trained = partition(run.params, mask)[0]
    for name, tree in run.params.items():
        mode = run.config.system.components[name].mode
        whole, part = (sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (tree, trained[name]))
        yield f"{name}: {whole:,} parameters, {part:,} of them trained (mode {mode})"
    step = sj.make_train_step(run.system, run.objective, run.optimizer, run.mesh, run.config.schedule.accumulate)
    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    yield str(sj.describe_sharding(step, state))
    batch = first_batch(run, batches)
    yield from _decoded(run, batch, folder)
    _, metrics = step(state, batch, run.key)
    values: Mapping[str, Any] = jax.device_get(metrics)
    more = ", to which sft adds" if run.config.objective.sft else ""
    yield f"loss at step 0: {float(values['loss']):.6f} (ln 2 = {math.log(2):.6f} with the sigmoid loss{more})"
    for node in run.system.nodes:
        if f"logps/chosen/{node.name}" in values:
            chosen, rejected = (float(values[f"logps/{side}/{node.name}"]) for side in ("chosen", "rejected"))
            yield f"{node.name}: log-probability {chosen:.3f} of the chosen, {rejected:.3f} of the rejected value"


def _decoded(run: Run, batch: PyTree, folder: Path) -> Iterator[str]:
    """The first values of a batch, turned back from what the models are given."""
    pair, sides = batch, []
    frozen = sj.replicate_per_process(run.system.frozen_params(run.params))
    if isinstance(batch, sj.SampledBatch):
        pair, sides = batch.outputs, [("intermediate", batch.intermediates)]
    for side, features in (*sides, ("chosen", pair.chosen), ("rejected", pair.rejected)):
        for name, values in ((name, only_runs(own)) for name, own in features.items()):
            if values is None:
                continue
            node = run.system.node(name)
            component = node.component
            if isinstance(component, sj.LanguageModel):
                yield from _texts(f"{side} {name}", component.tokenizer, values)
            elif isinstance(component, TextToImage):
                codec = frozen.get(node.params_key, {}).get("codec", {})
                yield from _images(f"{side} {name}", component, codec, values, folder)
            else:
                yield from _arrays(f"{side} {name}", values)


def _arrays(title: str, features: Features) -> Iterator[str]:
    """What a component of another kind is given, as it is."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
        first = " ".join(str(np.asarray(row).ravel()[:NUMBERS]) for row in leaf[:SHOWN])
        yield f"{title}{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)} {first}"


def _texts(title: str, tokenizer: Any, features: Features) -> Iterator[str]:
    tokens = features["tokens"].reshape(-1, features["tokens"].shape[-1])[:SHOWN]
    starts, ends = (features[name].reshape(-1)[:SHOWN] for name in ("prompt_lengths", "lengths"))
    for row, start, end in zip(tokens, starts, ends, strict=True):
        prompt, completion = tokenizer.decode(row[:start]), tokenizer.decode(row[start:end])
        yield f"{title}: {start} tokens {prompt!r} -> {end - start} tokens {completion!r}"


def _images(title: str, component: TextToImage, codec: Params, features: Features, folder: Path) -> Iterator[str]:
    """codec: its parameters."""
    latents = features["latents"]
    latents = latents.reshape(-1, *latents.shape[-3:])[:SHOWN]
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(component.codec.decode(codec, latents)):
        path = folder / f"{title.replace(' ', '-')}-{number}.png"
        to_image(image).save(path)
        yield f"{title}: {image.shape[0]} x {image.shape[1]} pixels, after the codec, in {path}"
