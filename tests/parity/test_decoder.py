"""The decoder against transformers' LlamaForCausalLM with the same random weights, in float32 on the CPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import PyTree
from transformers import PreTrainedModel

from sysdpo_jax.models.decoder import Decoder, DecoderConfig, init_cache
from sysdpo_jax.models.remat import POLICIES
from tests.parity.convert import llama_params, llama_tree, torch_decoder

BASE = DecoderConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
VARIANTS = {
    "grouped": BASE,
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True, rope_theta=100000.0, rms_norm_eps=1e-5),
    "own head width": dataclasses.replace(BASE, head_dim=16, num_key_value_heads=1),
    "one key per head": dataclasses.replace(BASE, num_key_value_heads=6, num_hidden_layers=1),
}
# Two float32 implementations that order their sums differently; the logits below are of order 10.
TOLERANCE = 1e-4
LENGTHS = np.array([9, 4, 1])
MIXED = ("full_attention", "sliding_attention", "full_attention")
# Nearly all the time of these tests is compilation, of programs that run once.
QUICK = {"xla_backend_optimization_level": 0}


def llama(config: DecoderConfig, seed: int = 0) -> PreTrainedModel:
    """A random LlamaForCausalLM of that shape."""
    return torch_decoder(config, seed)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=QUICK)
def run(config: DecoderConfig, params: PyTree, *inputs: Any, method: str | None = None) -> Any:
    return Decoder(config).apply({"params": params}, *inputs, method=method)


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, shape)


def padding(side: str, length: int) -> np.ndarray:
    """Bool [rows, length], True at the real tokens of rows of LENGTHS padded on one side."""
    slots = np.arange(length)
    real = slots < LENGTHS[:, None]
    return real if side == "right" else real[:, ::-1]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits(config: DecoderConfig) -> None:
    model, tokens = llama(config), random_tokens((3, 11))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = run(config, llama_params(model), jnp.array(tokens))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_init_has_the_converted_tree() -> None:
    for config in VARIANTS.values():
        made = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        converted = llama_params(llama(config))
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, converted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("give_positions", [True, False])
def test_padded_logits(side: str, give_positions: bool) -> None:
    """Padded rows agree with transformers' padded rows and with the same rows alone, whatever the padding."""
    model, length = llama(BASE), 12
    mask, tokens = padding(side, length), random_tokens((3, length), seed=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        expected = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    logits = run(
        BASE,
        llama_params(model),
        jnp.array(tokens),
        jnp.array(positions) if give_positions else None,
        jnp.array(mask),
    )
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], rtol=0, atol=TOLERANCE)
    assert np.isfinite(logits).all()
    for row, real in enumerate(mask):
        with torch.no_grad():
            alone = model(torch.from_numpy(tokens[row][real][None])).logits[0].numpy()
        np.testing.assert_allclose(np.asarray(logits)[row, real], alone, rtol=0, atol=TOLERANCE)


def sequence_log_prob(params: PyTree, config: DecoderConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over rows and real tokens after the first of log p(token | before)."""
    logits = Decoder(config).apply({"params": params}, tokens, None, mask)
    scores = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask[:, 1:] & mask[:, :-1], picked, 0.0))


@pytest.mark.parametrize("name", ["grouped", "tied"])
@pytest.mark.parametrize("remat", [None, "full"])
def test_gradients(name: str, remat: str | None) -> None:
    """The gradient of a padded batch's log-probability in every parameter, against torch autograd.

    1e-3 of each array's largest entry: float32 sums over 3 layers and 3 rows, ordered differently.
    """
    config = dataclasses.replace(VARIANTS[name], remat=remat)
    model, length = llama(config), 12
    mask, tokens = padding("left", length), random_tokens((3, length), seed=2)
    both = torch.from_numpy(mask[:, 1:] & mask[:, :-1])
    positions = torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    torch_tokens = torch.from_numpy(tokens)
    logits = model(torch_tokens, attention_mask=torch.from_numpy(mask.astype(np.int64)), position_ids=positions).logits
    picked = logits[:, :-1].log_softmax(-1).gather(-1, torch_tokens[:, 1:, None])[..., 0]
    total = picked[both].sum()
    total.backward()
    expected = llama_tree({n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})

    value, gradients = jax.jit(jax.value_and_grad(sequence_log_prob), static_argnums=1, compiler_options=QUICK)(
        llama_params(model), config, jnp.array(tokens), jnp.array(mask)
    )
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, expected)
    for path, wanted in jax.tree.leaves_with_path(expected):
        got = dict(jax.tree.leaves_with_path(gradients))[path]
        largest = np.abs(wanted).max()
        assert largest > 0
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * largest, err_msg=jax.tree_util.keystr(path))


def test_remat_changes_nothing() -> None:
    """The recomputed forward is the same program, so values and gradients agree to float32 rounding."""
    params = llama_params(llama(BASE))
    tokens, mask = jnp.array(random_tokens((3, 12))), jnp.array(padding("right", 12))
    kept, *others = [
        jax.jit(jax.value_and_grad(sequence_log_prob), static_argnums=1, compiler_options=QUICK)(
            params, dataclasses.replace(BASE, remat=remat), tokens, mask
        )
        for remat in (None, *POLICIES)
    ]
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max()), kept, other)


@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_rows_padded_on_the_right_need_no_mask(kind: str) -> None:
    """A real token sees what is before it, so the padding behind it changes nothing: the same sums, up to rounding."""
    layers = {"full": {}, "sliding": {"sliding_window": 3}, "mixed": {"sliding_window": 3, "layer_types": MIXED}}
    config = dataclasses.replace(BASE, **layers[kind])
    params, tokens, mask = llama_params(llama(BASE)), jnp.array(random_tokens((3, 12))), padding("right", 12)
    masked = run(config, params, tokens, None, jnp.array(mask), method="hidden_states")
    free = run(config, params, tokens, method="hidden_states")
    np.testing.assert_allclose(
        np.asarray(free)[mask], np.asarray(masked)[mask], rtol=0, atol=1e-6 * np.abs(masked).max()
    )
    program = jax.make_jaxpr(lambda p, t: Decoder(config).apply({"params": p}, t, method="hidden_states"))(
        params, tokens
    )
    assert ("bool[2,1,12,12]" in str(program)) == (kind == "mixed")


@pytest.mark.parametrize("chunks", [(12,), (5, 7), (8, 1, 1, 1, 1)])
def test_cached_logits_equal_uncached(chunks: tuple[int, ...]) -> None:
    """Rows padded in front and fed in pieces, all at the same slots, give the logits of the full forward."""
    params = llama_params(llama(BASE))
    tokens, mask = jnp.array(random_tokens((3, 12))), jnp.array(padding("left", 12))
    full = np.asarray(run(BASE, params, tokens, None, mask))
    cache, pieces, start = init_cache(BASE, batch=3, slots=15), [], 0
    for size in chunks:
        part = slice(start, start + size)
        logits, cache = run(BASE, params, tokens[:, part], None, mask[:, part], cache, jnp.int32(start))
        pieces.append(np.asarray(logits))
        start += size
    np.testing.assert_allclose(np.concatenate(pieces, 1)[mask], full[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(cache.valid[:, :12], mask)


def test_bfloat16_stays_close_and_gives_float32_logits() -> None:
    """bfloat16 keeps 8 bits (0.4 per cent): 3 layers may lose a few per cent of the logits."""
    params, tokens = llama_params(llama(BASE)), jnp.array(random_tokens((3, 11)))
    exact = run(BASE, params, tokens)
    rough = run(dataclasses.replace(BASE, dtype="bfloat16"), params, tokens)
    assert rough.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact) < 0.05


def test_head_on_a_stretch_of_hidden_states() -> None:
    for config in (BASE, VARIANTS["tied"]):
        params, tokens = llama_params(llama(config)), jnp.array(random_tokens((2, 8)))
        hidden = run(config, params, tokens, method="hidden_states")
        part = run(config, params, hidden[:, 3:5], method="head")
        whole = run(config, params, tokens)
        np.testing.assert_allclose(part, whole[:, 3:5], rtol=0, atol=TOLERANCE)


def test_errors() -> None:
    with pytest.raises(ValueError, match="key-value heads"):
        dataclasses.replace(BASE, num_key_value_heads=4)
    with pytest.raises(ValueError, match="set head_dim"):
        dataclasses.replace(BASE, hidden_size=50)
    with pytest.raises(ValueError, match="even"):
        dataclasses.replace(BASE, head_dim=7)
    with pytest.raises(ValueError, match="'everything': choose None or one of auto, whole, full, products_saveable"):
        dataclasses.replace(BASE, remat="everything")
    with pytest.raises(ValueError, match="unknown attention 'paged': choose among auto, plain"):
        dataclasses.replace(BASE, attention="paged")
    init = Decoder(BASE).init
    with pytest.raises(ValueError, match="max_position_embeddings 64"):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match="cache_slot"):
        jax.eval_shape(lambda k, t: init(k, t, cache_slot=0), jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
