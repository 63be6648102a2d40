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


def case(activation: str, with_projection: bool = False, eos_token_id: int = 30):
    shape = SHAPE | {"hidden_act": activation, "projection_dim": 12, "eos_token_id": eos_token_id}
    theirs = transformers.CLIPTextConfig(**shape, bos_token_id=0, layer_norm_eps=1e-4)
    model = (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(theirs).eval()
    randomise(model, 2)
    # The end of the text stands twice in the first row and not at all in the last.
    tokens = np.random.default_rng(0).integers(0, 40, (3, 7))
    tokens[0, [2, 5]], tokens[1, 4], tokens[2, 6] = 30, 30, 39
    config = CLIPTextConfig(**shape, with_projection=with_projection, layer_norm_eps=1e-4)
    return model, CLIPTextEncoder(config), tokens


def run(module, params, tokens, method="__call__"):
    return jax.jit(lambda p: module.apply({"params": p}, jnp.array(tokens), method=method))(params)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_and_gradients_equal_transformers(activation):
    """1e-4 and 1e-3 of a gradient's largest entry: float32 sums in another order."""
    model, module, tokens = case(activation)
    expected = model(torch.tensor(tokens)).last_hidden_state
    (expected**2 * torch.arange(16)).mean().backward()
    params = torch_params(model)
    np.testing.assert_allclose(run(module, params, tokens), expected.detach().numpy(), rtol=0, atol=1e-4)
    loss = lambda p: jnp.mean(module.apply({"params": p}, jnp.array(tokens)) ** 2 * jnp.arange(16))  # noqa: E731
    gradients, wanted = jax.jit(jax.grad(loss))(params), torch_gradients(model)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        # The gradient of k_proj's bias is 0 in exact arithmetic.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-6)


@pytest.mark.parametrize("eos_token_id", [2, 30])
@pytest.mark.parametrize("with_projection", [False, True])
def test_outputs_equal_transformers(with_projection, eos_token_id):
    """1e-4: float32 sums in another order. Ids have the end of the text 30 twice in one row, not at all in another."""
    model, module, tokens = case("gelu", with_projection, eos_token_id)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), output_hidden_states=True)
    found = run(module, torch_params(model), tokens, "outputs")
    pooled = theirs.text_embeds if with_projection else theirs.pooler_output
    expected = (theirs.last_hidden_state, theirs.hidden_states[-2], pooled)
    for ours, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 0.1
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
    assert found.pooled.shape == (3, 12 if with_projection else 16)


def test_the_two_rules_read_the_pooled_state_at_different_tokens():
    model, module, tokens = case("gelu")
    first_end = run(module, torch_params(model), tokens, "outputs")
    greatest = run(case("gelu", eos_token_id=2)[1], torch_params(model), tokens, "outputs")
    np.testing.assert_array_equal(first_end.last_hidden_state, greatest.last_hidden_state)
    np.testing.assert_array_equal(first_end.pooled[0], first_end.last_hidden_state[0, 2])
    np.testing.assert_array_equal(greatest.pooled[2], greatest.last_hidden_state[2, 6])
    assert np.abs(first_end.pooled - greatest.pooled).max() > 0.1


def test_initial_parameters_have_the_names_and_shapes_of_transformers():
    model, module, tokens = case("gelu", with_projection=True)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.array(tokens))["params"])
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, torch_params(model))


def test_later_tokens_do_not_change_earlier_states():
    _, module, tokens = case("gelu")
    params = module.init(jax.random.key(0), jnp.array(tokens))["params"]
    changed = tokens.copy()
    changed[:, 4:] = 0
    first, second = (run(module, params, ids) for ids in (tokens, changed))
    np.testing.assert_array_equal(first[:, :4], second[:, :4])
    assert np.abs(first[:, 4:] - second[:, 4:]).max() > 0


def test_what_it_cannot_build_or_read_is_refused():
    with pytest.raises(ValueError, match="unknown hidden_act 'relu'"):
        CLIPTextConfig(**SHAPE, hidden_act="relu")
    with pytest.raises(ValueError, match="3 heads do not divide"):
        CLIPTextConfig(**SHAPE | {"num_attention_heads": 3})
    with pytest.raises(ValueError, match="10 tokens, but max_position_embeddings=9"):
        CLIPTextEncoder(CLIPTextConfig(**SHAPE)).init(jax.random.key(0), jnp.zeros((1, 10), jnp.int32))
