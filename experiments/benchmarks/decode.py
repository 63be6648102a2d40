"""Sampling with a key-value cache on one device: milliseconds a token step, beside what the memory's speed allows.

    python -m experiments.benchmarks.decode                # Llama-3.2-1B, 64 x (512 + 256), bfloat16: for a GPU
    python -m experiments.benchmarks.decode --preset cpu   # SmolLM2-135M, 8 x (64 + 32), float32

A step reads the weights once and the filled part of the cache once; nothing less gives the next token of each row. That
many bytes, at the speed of a large copy measured in the same run, are the limit that the share is of. Weights are
random and no token ends a row: every row makes all its tokens. Prefilling is timed by itself, as a call that makes one
token, and is not part of a step.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu import seconds_each, spread
from experiments.common.command import made_by, parse_preset
from experiments.scaling import systems
from sysdpo_jax.decoding import generate
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.typing import Params

MODULE = "experiments.benchmarks.decode"


@dataclass(frozen=True)
class Config:
    """model: of experiments/scaling/shapes.yaml; prompt, new: tokens a row; copy_bytes: of the measured copy."""

    preset: str = "gpu"
    model: str = "llama-3.2-1b"
    dtype: str = "bfloat16"
    rows: int = 64
    prompt: int = 512
    new: int = 256
    repeats: int = 3
    copy_bytes: int = 2**30

    @property
    def decoder(self) -> DecoderConfig:
        """Shape and precision of the model."""
        return replace(systems.DECODERS[self.model], dtype=self.dtype, param_dtype=self.dtype)


PRESETS = {
    "gpu": Config(),
    "cpu": Config("cpu", "smollm2-135m", "float32", 8, 64, 32, copy_bytes=2**28),
    "tiny": Config("tiny", "tiny", "float32", 2, 4, 3, repeats=1, copy_bytes=2**20),
}


def step_bytes(decoder: DecoderConfig, params: Params, rows: int, prompt: int, new: int) -> float:
    """What a token step must read, on average: the weights that it uses, and the cache as far as it is filled."""
    used = {name: tree for name, tree in params.items() if decoder.tie_word_embeddings or name != "embed_tokens"}
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(used))
    token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_width
    filled = np.mean([min(prompt + made, prompt + new - 1) for made in range(1, max(new, 2))])
    return weights + rows * token * float(filled) * jnp.dtype(decoder.dtype).itemsize


def copy_rate(size: int, repeats: int) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = jnp.zeros(size // 2, jnp.bfloat16)
    copied = jax.jit(jnp.copy)
    return 2 * source.nbytes / spread(seconds_each(lambda: copied(source), repeats, 4))["median"]


def measure(decoder: DecoderConfig, rows: int, prompt: int, new: int, repeats: int, copy_bytes: int) -> dict[str, Any]:
    """Times of `generate` on random prompts, and the limit of memory traffic."""
    model = Decoder(decoder)
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, decoder.vocab_size, (rows, prompt), np.int32)

    def seconds(tokens: int) -> float:
        def run() -> jax.Array:
            made = generate(
                model,
                params,
                prompts,
                np.full(rows, prompt),
                jax.random.key(1),
                max_new_tokens=tokens,
                stop_tokens=(),
                pad_token=0,
            )
            return made.tokens

        return float(spread(seconds_each(run, repeats, 1))["median"])

    first, whole = seconds(1), seconds(new)
    step = (whole - first) / max(1, new - 1)
    rate = copy_rate(copy_bytes, repeats)
    limit = step_bytes(decoder, params, rows, prompt, new) / rate
    return {
        "device": jax.devices()[0].device_kind,
        "seconds": whole,
        "prefill_seconds": first,
        "new_tokens_per_second": rows * new / whole,
        "step_milliseconds": 1e3 * step,
        "limit_milliseconds": 1e3 * limit,
        "share_of_limit": limit / step,
        "copy_bytes_per_second": rate,
    }


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = parse_preset(PRESETS, arguments, __doc__)
    sizes = config.rows, config.prompt, config.new
    result = measure(config.decoder, *sizes, config.repeats, config.copy_bytes)
    result["case"] = f"{config.model}, {config.rows} x ({config.prompt} + {config.new}), {config.dtype}"
    result["made_by"] = made_by(MODULE, arguments, ("python", "jax", "jaxlib", "flax"))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
