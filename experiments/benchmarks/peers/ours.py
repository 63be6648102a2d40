"""Our side of each kind of work."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import sysdpo_jax as sj
from experiments.benchmarks import gpu
from experiments.benchmarks.gpu_cases import Case, images
from experiments.benchmarks.peers.side import COMPARED_TOKENS, Measured, answer, peak_rss, timed, versions
from experiments.benchmarks.peers.work import (
    CLIP,
    FILLED_WITH,
    LEARNING_RATE,
    Decode,
    Device,
    ImageDPO,
    TextDPO,
    Work,
    vocabulary,
)
from experiments.common.words import word_tokenizer
from experiments.scaling.systems import EncodedText, encoded_text
from sysdpo_jax.data import PreferenceBatches, read_ahead
from sysdpo_jax.decoding import generate
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.models import Decoder, DecoderConfig, UNet2DCondition, UNetConfig
from sysdpo_jax.runs import keep_compilations
from sysdpo_jax.training import SystemOptimizer, TrainState, count_units, memory
from sysdpo_jax.typing import Params


def measure(work: Work, folder: Path, told: Mapping[str, Any]) -> Measured:
    """Do it. told: nothing of it is read. Raises SystemExit where there is no such device."""
    if isinstance(work, ImageDPO) and work.device == "cpu":
        jax.config.update("jax_num_cpu_devices", devices(work))
    _require(work.device)
    keep_compilations(str(folder / "compiled"))
    match work:
        case TextDPO():
            return text_dpo(work, folder)
        case ImageDPO():
            return image_dpo(work, folder)
        case Decode():
            return decode(work, folder)


def roofline(device: Device, config: gpu.Config) -> dict[str, Any]:
    """`gpu.roofline` of the device. Raises SystemExit where there is none such."""
    _require(device)
    return gpu.roofline(config)


def _require(device: Device) -> None:
    if jax.default_backend() != device:
        raise SystemExit(f"JAX has no {device}, but {jax.devices()[0].device_kind}: choose another --preset")


def language_model(work: TextDPO | Decode, room: tuple[int, int]) -> sj.LanguageModel:
    """The decoder with a tokenizer of its words."""
    computing = {"dtype": work.precision, "param_dtype": work.precision}
    config = from_mapping(DecoderConfig, {**work.decoder, **computing})
    return sj.LanguageModel(Decoder(config), word_tokenizer(vocabulary(work.decoder)), *room)


@dataclass(frozen=True)
class Training:
    """A decoder as a system with its batches and its optimiser. parameters: how many; LoRA's scales are none."""

    system: sj.CompoundSystem
    batches: PreferenceBatches
    optimizer: SystemOptimizer
    state: TrainState
    parameters: int


def training(work: TextDPO, folder: Path) -> Training:
    """With random weights, which are kept for the peers."""
    model = language_model(work, work.room)
    system = sj.CompoundSystem(("prompt",), (sj.Node("answer", model, ("prompt",)),))
    records = [
        sj.PreferenceRecord({"prompt": row["prompt"]}, {"answer": row["chosen"]}, {"answer": row["rejected"]})
        for row in work.rows()
    ]
    batches = sj.preference_dataset(system, records, work.pairs, seed=0, shapes=work.shapes)
    params = jax.jit(system.init)(jax.random.key(0))
    _hand_on(work, folder, model, params["answer"])
    parameters = _count(params)
    trained: dict[str, Any] = {"master_weights": work.precision != "float32"}
    if work.lora_rank:
        trained = {"trainable": sj.LORA_PARAMS}
        lora = sj.LoRA(work.lora_rank, 2.0 * work.lora_rank, targets="attention")
        params = {"answer": sj.add_lora(params["answer"], lora, jax.random.key(2))}
    adamw = sj.ComponentOptimizer(optax.adamw(LEARNING_RATE, weight_decay=0.0), clip_norm=CLIP, **trained)
    optimizer = sj.make_optimizer({"answer": adamw})
    state = sj.create_state(system, params, optimizer)
    return Training(system, batches, optimizer, state, parameters + (_count(state.trained) if work.lora_rank else 0))


def text_dpo(work: TextDPO, folder: Path) -> Measured:
    """An epoch of `preference_dataset`. A step is timed from the end of the one before to its own, data included.

    Every shape of a batch has run once before, that of the first step first: it is what the peers are compared with.
    """
    began = time.perf_counter()
    made = training(work, folder)
    batches, state, key = made.batches, made.state, jax.random.key(1)
    step = sj.make_train_step(made.system, sj.DirectObjective(), made.optimizer)
    firsts = {batches.plan.at(number)[1]: number for number in reversed(range(work.steps))}
    metrics, first_seconds = [], 0.0
    for number in sorted(firsts.values()):
        state, found = step(state, batches[number], key)
        metrics.append(jax.block_until_ready(found))
        first_seconds = first_seconds or time.perf_counter() - began
    ends = [time.perf_counter()]
    with read_ahead(batches, 0) as elements:
        for _, batch in zip(range(work.steps), elements, strict=False):
            state, found = step(state, batch, key)
            metrics.append(jax.block_until_ready(found))
            ends.append(time.perf_counter())
    if not all(bool(each["finite"]) for each in metrics):
        raise SystemExit("a step was not finite")
    tokens, places = _tokens(made, work.steps)
    checks = {
        "loss": float(metrics[0]["loss"]),
        "gradient": float(metrics[0]["grad_norm/answer"]),
        "tokens": tokens,
    }
    about = {
        "rows": batches.plan.at(0)[0].tolist(),
        "padding": 1 - tokens / places,
        "shapes": [list(sizes) for sizes in sorted(firsts)],
    }
    return _measured(work.device, np.diff(ends).tolist(), first_seconds, made.parameters, checks, about)


def _tokens(made: Training, steps: int) -> tuple[int, int]:
    """The tokens of an epoch, each prompt counted with both of its answers, and the places that they have."""
    batches = [made.batches[number] for number in range(steps)]
    places = sum(np.size(side["answer"]["tokens"]) for batch in batches for side in (batch.chosen, batch.rejected))
    return sum(count_units(made.system, batch)["tokens_per_second/answer"] for batch in batches), places


def devices(work: ImageDPO) -> int:
    """Into how many the batch is cut: on a CPU one of JAX's devices a core, where the pairs divide."""
    return math.gcd(len(os.sched_getaffinity(0)), work.pairs) if work.device == "cpu" else 1


def image_dpo(work: ImageDPO, folder: Path) -> Measured:
    """`gpu.measure` of the U-Net, each device with its own rows."""
    began = time.perf_counter()
    computing = {"dtype": work.precision, "param_dtype": work.precision}
    config = from_mapping(UNetConfig, {**work.unet, **computing})
    sized = config.addition_embed_type is not None
    text = encoded_text(config) if sized else EncodedText(((work.text, config.cross_attention_dim),))
    codec = sj.PixelCodec((work.latent, work.latent, config.in_channels))
    component = sj.Diffusion(UNet2DCondition(config), text, codec)
    optimizers = {"adamw": optax.adamw(LEARNING_RATE, weight_decay=0.0), "adafactor": optax.adafactor(LEARNING_RATE)}
    plain = images("unet", component, work.pairs, 8 * work.latent, LEARNING_RATE)
    case = Case("unet", component, plain.size, optimizers[work.optimizer], plain.side)
    ready = time.perf_counter() - began
    timing = gpu.Config(repeats=work.repeats, steps=work.steps, folder=folder)
    found = gpu.measure(case, timing, sj.make_mesh(data=devices(work)))
    checks = {"loss": found["first_loss"]} | ({} if sized else {"probe": probe(work, config)})
    return _measured(
        work.device,
        found["seconds_per_step"]["all"],
        ready + found["first_step_seconds"],
        sum(found["parameters"].values()),
        checks,
        {"model_flops_per_step": found["model_flops_per_step"], "devices": devices(work)},
        found["peak_bytes"],
    )


def probe(work: ImageDPO, config: UNetConfig) -> float:
    """The root mean square of what the U-Net makes of the work's fixed inputs when all its weights are one number."""
    unet, inputs = UNet2DCondition(config), work.probe(config.in_channels, config.cross_attention_dim)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)
    filled = jax.tree.map(lambda leaf: jnp.full(leaf.shape, FILLED_WITH, leaf.dtype), shapes)
    made: Any = jax.jit(unet.apply)(filled, *inputs)
    return float(jnp.sqrt(jnp.mean(jnp.square(made))))


def decode(work: Decode, folder: Path) -> Measured:
    """`generate` on the whole batch."""
    began = time.perf_counter()
    model = language_model(work, (work.prompt, work.new))
    params = jax.jit(model.init)(jax.random.key(0))
    _hand_on(work, folder, model, params)
    prompts, lengths = jnp.asarray(work.prompts()), jnp.full(work.rows, work.prompt)
    made: Any = None

    def run() -> None:
        nonlocal made
        made = generate(
            model.decoder,
            params,
            prompts,
            lengths,
            jax.random.key(1),
            max_new_tokens=work.new,
            stop_tokens=(),
            pad_token=0,
            temperature=0.0 if work.greedy else 1.0,
        )

    def wait() -> None:
        jax.block_until_ready(made)

    timed(run, wait, 1, 1)
    first_seconds = time.perf_counter() - began
    seconds = timed(run, wait, work.repeats, 1)
    tokens = np.asarray(made.tokens)
    checks: dict[str, Any] = {"shape": list(tokens.shape)}
    if work.same_weights:
        checks["tokens"] = tokens[:, :COMPARED_TOKENS].tolist()
    return _measured(work.device, seconds, first_seconds, _count(params), checks, {})


def _hand_on(work: TextDPO | Decode, folder: Path, model: sj.LanguageModel, params: Params) -> None:
    """The weights for the peers, which are the same in every round."""
    if work.same_weights and not (folder / "weights").exists():
        sj.pretrained.save(folder / "weights", model, params)


def _count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _measured(
    device: Device,
    seconds: list[float],
    first_seconds: float,
    parameters: int,
    checks: Mapping[str, Any],
    about: Mapping[str, Any],
    peak: float | None = None,
) -> Measured:
    """With the memory of the device, where it says how much, else of the process."""
    own = peak if peak is not None else memory(jax.devices()[:1]).get("memory/peak_bytes", peak_rss())
    kind = jax.devices()[0].device_kind
    return Measured(seconds, first_seconds, parameters, checks, own, kind, versions("jax", "jaxlib", "flax"), about)


if __name__ == "__main__":
    answer(measure)
