"""The benchmark of decoding at toy size, and the bytes of its limit by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import decode
from sysdpo_jax.models import Decoder


def test_the_toy_preset_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--preset", "tiny"])
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == "tiny, 2 x (4 + 3), float32"
    assert found["new_tokens_per_second"] == pytest.approx(6 / found["seconds"])
    assert found["share_of_limit"] == pytest.approx(found["limit_milliseconds"] / found["step_milliseconds"])


def test_the_limit_is_the_weights_and_the_filled_cache() -> None:
    """4 bytes of every weight but an untied embedding; keys and values of 5 and 6 filled slots, 5.5 on average."""
    config = decode.PRESETS["tiny"].decoder
    for tied in (False, True):
        decoder = dataclasses.replace(config, tie_word_embeddings=tied)
        params = jax.eval_shape(Decoder(decoder).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        weights = sum(x.size for x in jax.tree.leaves(params)) - (0 if tied else 64 * 32)
        cache = 2 * 2 * 2 * 5.5 * decoder.num_key_value_heads * decoder.head_width
        assert decode.step_bytes(decoder, params, rows=2, prompt=4, new=3) == 4 * (weights + cache)
