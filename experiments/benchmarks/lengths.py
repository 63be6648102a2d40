"""A DPO step on rows of very different lengths beside TRL's, on the same cores.

    make benchmark-lengths
    python -m experiments.benchmarks.lengths > docs/benchmarks/lengths.json

Expected on two idle cores: a ratio (TRL's mean seconds / ours) above 1.3, in about five minutes.

Both sides train the same decoder (6 layers of width 384, a vocabulary of 16384, float32, nothing recomputed) with AdamW
on the same words, 8 pairs a step, once over all of them. The lengths of prompts and answers are lognormal (sigma 0.8,
medians 40, 30 and 30 tokens, 4 to 128), as those of real conversations are skewed: a batch that is padded to its
longest row computes much padding. `preference_dataset` puts rows of like lengths into a batch; TRL's trainer, with its
defaults, takes rows as they come.

The sides run one after the other, each in a process of its own. A step is timed from the end of the one before to its
own end, data included. Compilation is left out: on our side every shape has run once before, and TRL's first step,
which warms it up, is not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax

import sysdpo_jax as sj
from experiments.common.command import made_by, parse
from experiments.common.models import word_tokenizer
from sysdpo_jax.data import PreferenceBatches, read_ahead
from sysdpo_jax.models import Decoder, DecoderConfig

MODULE = "experiments.benchmarks.lengths"
MEDIANS, SIGMA, SHORTEST, LONGEST = {"prompt": 40, "chosen": 30, "rejected": 30}, 0.8, 4, 128
LEARNING_RATE, CLIP = 1e-6, 1.0


@dataclass(frozen=True)
class Config:
    """steps: of an epoch, which is timed; layers, width, vocabulary: of the decoder; side: both, or one by itself."""

    steps: int = 24
    pairs: int = 8
    layers: int = 6
    width: int = 384
    vocabulary: int = 16384
    shapes: int = 8
    side: Literal["both", "ours", "trl"] = "both"

    @property
    def decoder(self) -> DecoderConfig:
        """Shape of the model, of either side."""
        return DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
        )


def tokenizer(vocabulary: int) -> Any:
    """Of words w3, w4, ..., a token each."""
    return word_tokenizer([f"w{number}" for number in range(3, vocabulary)])


def rows(config: Config) -> list[dict[str, str]]:
    """Prompts and answers of random words."""
    random = np.random.default_rng(0)

    def words(median: int) -> str:
        number = int(np.clip(random.lognormal(np.log(median), SIGMA), SHORTEST, LONGEST))
        return " ".join(f"w{word}" for word in random.integers(3, config.vocabulary, number))

    made = [{name: words(median) for name, median in MEDIANS.items()} for _ in range(config.pairs * config.steps)]
    # A space ends the prompt, so that its last word and the first of the answer are two.
    return [row | {"prompt": f"{row['prompt']} "} for row in made]


def ours(config: Config) -> dict[str, Any]:
    """Seconds of each of our steps, and how much of the batches is padding."""
    model = sj.LanguageModel(Decoder(config.decoder), tokenizer(config.vocabulary), LONGEST, LONGEST + 1)
    system = sj.CompoundSystem(("prompt",), (sj.Node("answer", model, ("prompt",)),))
    records = [
        sj.PreferenceRecord({"prompt": row["prompt"]}, {"answer": row["chosen"]}, {"answer": row["rejected"]})
        for row in rows(config)
    ]
    batches = sj.preference_dataset(system, records, config.pairs, seed=0, shapes=config.shapes)
    adamw = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    optimizer = sj.make_optimizer({"answer": sj.ComponentOptimizer(adamw, clip_norm=CLIP)})
    step, key = sj.make_train_step(system, sj.DirectObjective(), optimizer), jax.random.key(1)
    state = sj.create_state(system, system.init(jax.random.key(0)), optimizer)
    steps = batches.plan.per_epoch
    # Each shape of the epoch is compiled by a step.
    first = {batches.plan.at(number)[1]: number for number in range(steps)}
    for number in first.values():
        state, metrics = step(state, batches[number], key)
        jax.block_until_ready(metrics)
    ends = [time.perf_counter()]
    with read_ahead(batches, 0) as elements:
        for _, batch in zip(range(steps), elements, strict=False):
            state, metrics = step(state, batch, key)
            jax.block_until_ready(metrics)
            ends.append(time.perf_counter())
    return {
        "seconds": np.diff(ends).tolist(),
        "padding": padding(batches, model, steps),
        "shapes": [list(sizes) for sizes in sorted(first)],
        "steps": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(state.trained)),
    }


def padding(batches: PreferenceBatches, model: sj.LanguageModel, steps: int) -> float:
    """The share of padding among the tokens of an epoch."""
    sides = [side["answer"] for number in range(steps) for side in batches[number][:2]]
    places = [np.size(side["tokens"]) for side in sides]
    return float(np.average([model.padding(side) for side in sides], weights=places))


def trl(config: Config) -> dict[str, Any]:
    """The same of TRL's steps."""
    # Imported here: the library and its tests need neither.
    import datasets
    import torch
    import transformers
    import trl

    torch.manual_seed(0)
    shape, words = config.decoder, tokenizer(config.vocabulary)
    # Any: transformers' annotations do not admit what its classes take and make.
    llama_config: Any = transformers.LlamaConfig
    llama = llama_config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        attn_implementation="sdpa",
    )
    model: Any = transformers.LlamaForCausalLM(llama)
    reference: Any = transformers.LlamaForCausalLM(llama)
    reference.load_state_dict(model.state_dict())
    ends: list[float] = []
    real, places = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=config.pairs,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP,
            max_length=2 * LONGEST + 1,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        data = datasets.Dataset.from_list(rows(config))
        trainer = trl.DPOTrainer(
            model, ref_model=reference, args=settings, train_dataset=data, processing_class=words, callbacks=[Clock()]
        )
        collate: Any = trainer.data_collator

        def counted(examples: Any) -> Any:
            made = collate(examples)
            real.append(int(made["attention_mask"].sum()))
            places.append(made["attention_mask"].numel())
            return made

        trainer.data_collator = counted
        trainer.train()
    return {
        "seconds": np.diff(ends).tolist(),
        "padding": 1 - sum(real) / sum(places),
        "steps": len(ends),
        "parameters": sum(weights.numel() for weights in model.parameters()),
    }


def alone(side: str, arguments: list[str]) -> dict[str, Any]:
    """What one side gives in a process of its own."""
    command = [sys.executable, "-m", MODULE, *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"the side {side!r} ended with exit code {done.returncode}: see what it says above")
    # TRL prints its summary on the lines before.
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {np.mean(found['seconds']):.2f} s a step", file=sys.stderr)
    return found


def summary(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean seconds of a step of both sides, their ratio, and what the times are made of."""
    means = {name: float(np.mean(side["seconds"])) for name, side in sides.items()}
    about = {
        name: {
            "mean_seconds": round(means[name], 4),
            "median_seconds": round(float(np.median(side["seconds"])), 4),
            "steps_timed": len(side["seconds"]),
            "padding": round(side["padding"], 4),
            "parameters": side["parameters"],
        }
        for name, side in sides.items()
    }
    about["ours"] |= {"compiled_shapes": len(sides["ours"]["shapes"]), "shapes": sides["ours"]["shapes"]}
    return {"ratio": round(means["trl"] / means["ours"], 3), **about}


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = parse(Config(), arguments, __doc__)
    if config.side != "both":
        print(json.dumps(ours(config) if config.side == "ours" else trl(config)))
        return
    before = os.getloadavg()[0]
    result = summary({side: alone(side, arguments) for side in ("ours", "trl")})
    packages, cores = ("jax", "torch", "transformers", "trl"), len(os.sched_getaffinity(0))
    result["made_by"] = made_by(MODULE, arguments, packages, cores, f", load before {before:.1f}")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
