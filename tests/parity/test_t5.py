"""Our T5 encoder against transformers' T5EncoderModel, float32, on small random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sysdpo_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.parity.convert_diffusion import randomise
from tests.parity.convert_sd3 import torch_gradients, torch_params

# More heads than d_model / d_kv, as no rule ties them; few buckets, so that 23 tokens reach the last one.
SHAPE = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 15,
    "layer_norm_epsilon": 1e-4,
}


def case():
    config = transformers.T5Config(**SHAPE, feed_forward_proj="gated-gelu")
    model = transformers.T5EncoderModel(config).eval()
    randomise(model, 3)
    with torch.no_grad():
        # Positions count for as much as content.
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight *= 5
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 40, (3, 23)), np.arange(23) < np.array([[23], [9], [1]])
    return model, T5Encoder(T5Config(**SHAPE)), tokens, mask


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_gradients_equal_transformers(masked):
    """1e-4 and 1e-3 of a gradient's largest entry: float32 sums in another order."""
    model, module, tokens, mask = case()
    mask = mask if masked else None
    expected = model(
        torch.tensor(tokens), attention_mask=None if mask is None else torch.tensor(mask)
    ).last_hidden_state
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    (expected**2 * torch.tensor(weights)).mean().backward()
    params = torch_params(model)

    @jax.jit
    def run(p):
        states = module.apply({"params": p}, jnp.array(tokens), None if mask is None else jnp.array(mask))
        return jnp.mean(states**2 * weights), states

    (_, found), gradients = jax.value_and_grad(run, has_aux=True)(params)
    assert found.dtype == jnp.float32
    assert 1 < np.abs(found).max() < 20
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-4)
    wanted = torch_gradients(model)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), gradients, wanted), is_leaf=lambda x: isinstance(x, tuple)
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near_transformers_float32(dtype):
    """Everywhere that it is asked for, CPUs too: 10 and 7 bits of a product's factors, through three blocks."""
    model, _, tokens, mask = case()
    expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.detach().numpy()
    module = T5Encoder(T5Config(**SHAPE, dtype=dtype))
    found = jax.jit(module.apply)({"params": torch_params(model)}, jnp.array(tokens), jnp.array(mask))
    tolerance = {"float16": 0.01, "bfloat16": 0.08}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_what_the_mask_hides_changes_nothing_and_no_mask_hides_nothing():
    model, module, tokens, mask = case()
    params = {"params": torch_params(model)}
    apply = jax.jit(module.apply)
    other = np.where(mask, tokens, (tokens + 1) % 40)
    masked, changed = (np.asarray(apply(params, jnp.array(ids), jnp.array(mask))) for ids in (tokens, other))
    np.testing.assert_array_equal(masked[mask], changed[mask])
    free = np.asarray(apply(params, jnp.array(tokens)))
    assert np.abs(free - masked)[1, :9].max() > 0.1
    np.testing.assert_allclose(free[0], masked[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 15), (8, 500), (64, 256)])
def test_buckets_equal_those_of_transformers(buckets, distance):
    """To the longest sequence of the release and beyond the farthest bucket."""
    attention = transformers.models.t5.modeling_t5.T5Attention
    positions = torch.arange(600)
    expected = attention._relative_position_bucket(positions[None] - positions[:, None], True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), expected.numpy())


def test_bfloat16_computes_in_bfloat16_and_reports_in_float32():
    model, _, tokens, mask = case()
    module = T5Encoder(T5Config(**SHAPE, dtype="bfloat16"))
    args = ({"params": torch_params(model)}, jnp.array(tokens), jnp.array(mask))
    products = [line for line in str(jax.make_jaxpr(module.apply)(*args)).splitlines() if "dot_general[" in line]
    assert len(products) == 9 * SHAPE["num_layers"]
    # Scores are summed in float32 from bfloat16 operands.
    assert sum(":bf16[" in line for line in products) == 8 * SHAPE["num_layers"]
    assert jax.jit(module.apply)(*args).dtype == jnp.float32


def test_buckets_that_make_no_halves_are_refused():
    with pytest.raises(ValueError, match="relative_attention_num_buckets=6 must be a multiple of 4"):
        T5Config(relative_attention_num_buckets=6)
    with pytest.raises(ValueError, match="less than relative_attention_max_distance=8"):
        T5Config(relative_attention_max_distance=8)
