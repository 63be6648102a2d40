"""Our CLIP text encoder against transformers' CLIPTextModel, float32, on small random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from tests.parity.convert_diffusion import randomise, torch_gradients, torch_params

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
}


def case(activation: str):
    theirs = transformers.CLIPTextConfig(**SHAPE, hidden_act=activation, layer_norm_eps=1e-4)
    model = transformers.CLIPTextModel(theirs).eval()
    randomise(model, 2)
    tokens = np.random.default_rng(0).integers(0, 40, (3, 7))
    return model, CLIPTextEncoder(CLIPTextConfig(**SHAPE, hidden_act=activation, layer_norm_eps=1e-4)), tokens


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_and_gradients_equal_transformers(activation):
    """1e-4 and 1e-3 of a gradient's largest entry: float32 sums in another order."""
    model, module, tokens = case(activation)
    expected = model(torch.tensor(tokens)).last_hidden_state
    (expected**2 * torch.arange(16)).mean().backward()
    params = torch_params(model)
    found = module.apply({"params": params}, jnp.array(tokens))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-4)
    loss = lambda p: jnp.mean(module.apply({"params": p}, jnp.array(tokens)) ** 2 * jnp.arange(16))  # noqa: E731
    gradients, wanted = jax.grad(loss)(params), torch_gradients(model)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        # The gradient of k_proj's bias is 0 in exact arithmetic.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-6)


def test_later_tokens_do_not_change_earlier_states():
    _, module, tokens = case("gelu")
    params = module.init(jax.random.key(0), jnp.array(tokens))
    changed = tokens.copy()
    changed[:, 4:] = 0
    first, second = (module.apply(params, jnp.array(ids)) for ids in (tokens, changed))
    np.testing.assert_array_equal(first[:, :4], second[:, :4])
    assert np.abs(first[:, 4:] - second[:, 4:]).max() > 0


def test_what_it_cannot_build_or_read_is_refused():
    with pytest.raises(ValueError, match="unknown hidden_act 'relu'"):
        CLIPTextConfig(**SHAPE, hidden_act="relu")
    with pytest.raises(ValueError, match="3 heads do not divide"):
        CLIPTextConfig(**SHAPE | {"num_attention_heads": 3})
    with pytest.raises(ValueError, match="10 tokens, but max_position_embeddings=9"):
        CLIPTextEncoder(CLIPTextConfig(**SHAPE)).init(jax.random.key(0), jnp.zeros((1, 10), jnp.int32))
