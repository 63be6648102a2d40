"""Each family of decoders against transformers' model of it with the same random weights, in float32 on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import PyTree
from transformers import PreTrainedModel

from sysdpo_jax.decoding.decode import generate
from sysdpo_jax.models.decoder import Decoder, DecoderConfig, init_cache
from sysdpo_jax.models.rotary import RopeScaling, frequencies
from tests.parity.convert import llama_params, torch_decoder
from tests.parity.test_decoder import BASE, LENGTHS, TOLERANCE, padding, random_tokens, run

FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA = dataclasses.replace(BASE, max_position_embeddings=512)
QWEN2 = dataclasses.replace(BASE, model_type="qwen2", qkv_bias=True, num_hidden_layers=4)
QWEN3 = dataclasses.replace(BASE, model_type="qwen3", qk_norm=True, head_dim=16, num_hidden_layers=4)
GEMMA2 = dataclasses.replace(
    BASE,
    model_type="gemma2",
    num_hidden_layers=4,
    head_dim=16,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
    post_norms=True,
    norm_unit_offset=True,
    scale_embeddings=True,
    query_pre_attn_scalar=11.0,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=8.0,
    sliding_window=3,
    layer_types=(SLIDING, FULL, SLIDING, FULL),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    num_hidden_layers=6,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL),
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    qk_norm=True,
    rope_theta=1e6,
    rope_local_base_freq=100.0,
    rope_scaling=RopeScaling("linear", 4.0),
)
# With heads of width 8 the wavelengths are 6, 63, 628 and 6283: one is kept, one smoothed, two are divided.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 128)
# The window is shorter than the longest row, and the layers that do and do not slide come in turn.
VARIANTS = {
    "llama3": dataclasses.replace(LLAMA, rope_scaling=LLAMA3),
    "llama linear, biases": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 3.0), attention_bias=True),
    "mistral": dataclasses.replace(BASE, model_type="mistral", sliding_window=4),
    "qwen2": QWEN2,
    "qwen2 window": dataclasses.replace(
        QWEN2, sliding_window=3, layer_types=(FULL, FULL, SLIDING, SLIDING), tie_word_embeddings=True
    ),
    "qwen3": QWEN3,
    "qwen3 window": dataclasses.replace(
        QWEN3, sliding_window=5, layer_types=(SLIDING, FULL, FULL, SLIDING), attention_bias=True
    ),
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
SLIDERS = [name for name, config in VARIANTS.items() if config.sliding_window is not None]
by_name = pytest.mark.parametrize("name", VARIANTS)
sliding_by_name = pytest.mark.parametrize("name", SLIDERS)


@functools.cache
def case(name: str) -> tuple[DecoderConfig, PreTrainedModel, PyTree]:
    config = VARIANTS[name]
    model = torch_decoder(config, seed=5)
    return config, model, llama_params(model)


def torch_logits(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    with torch.no_grad():
        return model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0)),
        ).logits.numpy()


@by_name
def test_init_has_the_converted_tree(name: str) -> None:
    config, _, params = case(name)
    made = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


@by_name
def test_logits_with_padding_on_either_side(name: str) -> None:
    """The longest row has 9 tokens; the outputs at padding are free, but finite."""
    config, model, params = case(name)
    tokens = random_tokens((3, 12), seed=1)
    for side in ("left", "right"):
        mask = padding(side, 12)
        expected = torch_logits(model, tokens, mask)
        logits = np.asarray(run(config, params, jnp.array(tokens), None, jnp.array(mask)))
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=TOLERANCE)
        assert np.isfinite(logits).all()
        longest = mask.sum(axis=1).argmax()
        alone = torch_logits(model, tokens[longest][mask[longest]][None])[0]
        np.testing.assert_allclose(logits[longest, mask[longest]], alone, rtol=0, atol=TOLERANCE)


@sliding_by_name
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_logits(name: str, side: str) -> None:
    """Rows fed in pieces of 8 and 4 through a cache with spare slots give transformers' uncached logits.

    The padded prompts are followed by real tokens, so with padding on the right a row has a gap of slots that only
    the positions tell apart from distance.
    """
    config, model, params = case(name)
    mask = np.concatenate([padding(side, 9)[:, :8], np.ones((3, 4), bool)], axis=1)
    tokens = random_tokens((3, 12), seed=2)
    cache, pieces, start = init_cache(config, batch=3, slots=15), [], 0
    for size in (8, 4):
        part = slice(start, start + size)
        arrays = jnp.array(tokens[:, part]), None, jnp.array(mask[:, part]), cache, jnp.int32(start)
        logits, cache = run(config, params, *arrays)
        pieces.append(np.asarray(logits))
        start += size
    found = np.concatenate(pieces, axis=1)
    for row, real in enumerate(mask):
        alone = torch_logits(model, tokens[row][real][None])[0]
        np.testing.assert_allclose(found[row, real], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_the_window_and_the_kind_of_each_layer_matter(name: str) -> None:
    """Without them the logits are others by far more than the tolerance, so the tests above would notice."""
    config, _, params = case(name)
    tokens = jnp.array(random_tokens((2, 12), seed=3))
    logits = run(config, params, tokens)
    assert config.sliding_window is not None
    others = [dataclasses.replace(config, sliding_window=config.sliding_window + 1)]
    if config.layer_types is not None:
        others.append(dataclasses.replace(config, layer_types=(*config.layer_types[1:], config.layer_types[0])))
    for other in others:
        assert jnp.abs(run(other, params, tokens) - logits).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_greedy_continuations_equal_transformers(name: str) -> None:
    """Ragged prompts, padded on the right for ours and on the left for theirs, across the window's edge.

    The head is untied: a random tied one does little but repeat the last token.
    """
    config = dataclasses.replace(VARIANTS[name], tie_word_embeddings=False)
    model = torch_decoder(config, seed=5)
    params, lengths, new = llama_params(model), LENGTHS, 8
    tokens = random_tokens((3, 9), seed=4)
    real = np.arange(9) < lengths[:, None]
    left = np.stack([np.roll(row, 9 - length) for row, length in zip(tokens, lengths, strict=True)])
    expected = model.generate(
        torch.from_numpy(left),
        attention_mask=torch.from_numpy(real[:, ::-1].astype(np.int64)),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )[:, 9:].numpy()
    made = generate(
        Decoder(config),
        params,
        tokens,
        lengths,
        jax.random.key(0),
        max_new_tokens=new,
        stop_tokens=(),
        pad_token=0,
        temperature=0.0,
    )
    np.testing.assert_array_equal(made.tokens, expected)
    assert len(np.unique(expected)) > 5


def test_scaled_frequencies_by_hand() -> None:
    """Wavelengths against Llama 3's rule in float64 NumPy: kept, in between, divided."""
    plain = 10000.0 ** (-np.arange(4) / 4)
    wavelengths = 2 * np.pi / plain
    assert wavelengths[0] < 32 < wavelengths[1] < 128 < wavelengths[2]
    share = (128 / wavelengths[1] - 1) / (4 - 1)
    middle = plain[1] * (share + (1 - share) / 8)
    expected = [plain[0], middle, plain[2] / 8, plain[3] / 8]
    np.testing.assert_allclose(frequencies(8, 10000.0, LLAMA3), expected, rtol=1e-5)
    np.testing.assert_allclose(frequencies(8, 10000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-5)


def test_gemma_rounds_the_scale_of_embeddings_to_the_precision_of_the_model() -> None:
    """sqrt(48) = 6.928 is 6.9375 in bfloat16, the factor of transformers' bfloat16 model."""
    config, model, params = case("gemma2")
    half, tokens = torch_decoder(config, seed=5).bfloat16(), random_tokens((2, 8))
    for torch_model, dtype in ((model, "float32"), (half, "bfloat16")):
        expected = torch_model.model.embed_tokens(torch.from_numpy(tokens)).float().detach().numpy()
        found = run(dataclasses.replace(config, dtype=dtype), params, jnp.array(tokens), method="embed")
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def test_what_makes_no_model_is_refused() -> None:
    for change, message in (
        ({"hidden_act": "relu"}, "unknown hidden_act 'relu'"),
        ({"layer_types": (FULL, SLIDING)}, "each of the 3 layers"),
        ({"layer_types": (FULL, SLIDING, "chunked_attention")}, "chunked_attention"),
        ({"layer_types": (FULL, SLIDING, FULL)}, "need a sliding_window of at least 1, got None"),
        ({"sliding_window": 0}, "need a sliding_window of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(BASE, **change)
    with pytest.raises(ValueError, match="unknown rope_type 'yarn'"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(ValueError, match="'llama3' needs exactly"):
        RopeScaling("llama3", 2.0)
    with pytest.raises(ValueError, match="must be positive"):
        RopeScaling("linear", 0.0)


def test_equal_models_have_equal_configurations() -> None:
    restated = dataclasses.replace(
        BASE, head_dim=8, query_pre_attn_scalar=8.0, sliding_window=7, layer_types=(FULL,) * 3, rope_local_base_freq=1.0
    )
    assert restated == BASE
    assert hash(restated) == hash(BASE)
    window = dataclasses.replace(BASE, sliding_window=7)
    assert dataclasses.replace(window, layer_types=(SLIDING,) * 3, rope_local_base_freq=10000.0) == window
