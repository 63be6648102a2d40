"""Decoding with parameters spread over 8 virtual devices: prints, as JSON, whether it finds what one device finds.

Run by test_decode_meshes.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sysdpo_jax.decoding import BeamSearch, beam_generate, generate
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.parallel.sharding import activation_rules, make_mesh, tree_shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=6,
    layer_types=("sliding_attention", "full_attention"),
)
ROWS, WIDTH, NEW = 8, 6, 7
MESHES = {"1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8)}


def decoded(params: PyTree) -> dict[str, Any]:
    random = np.random.default_rng(0)
    prompts, lengths = random.integers(0, 64, (ROWS, WIDTH)), random.integers(1, WIDTH + 1, ROWS)
    ends: dict[str, Any] = {"max_new_tokens": NEW, "stop_tokens": (3, 4, 5), "pad_token": 0}
    every = Decoder(CONFIG), params, prompts, lengths
    beams = beam_generate(*every, num_beams=2, search=BeamSearch(1), **ends)
    sampled = {f"places {n}": generate(*every, jax.random.key(0), places=n, **ends).tokens for n in (None, 4)}
    return {"beams": beams.tokens, "scores": beams.log_probs} | sampled


def main() -> None:
    """Random weights, sharp enough that float32 roundings decide nothing."""
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    alone, found = jax.device_get(decoded(params)), {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(*sizes)
        with activation_rules(mesh):
            spread = jax.device_get(decoded(jax.device_put(params, tree_shardings(mesh, params))))
        found[name] = {key: float(np.abs(spread[key] - alone[key]).max()) for key in alone}
    found["distinct"] = len(np.unique(alone["places None"]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
