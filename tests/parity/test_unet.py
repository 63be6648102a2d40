"""Our U-Net against diffusers' UNet2DConditionModel, float32, on small random models."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from tests.parity.convert_diffusion import randomise, torch_gradients, torch_params

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
BASE = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 12, "norm_num_groups": 4}
CONFIGS = {
    # As Stable Diffusion 1: a last level without attention, one number of heads, convolutional projections.
    "sd1": BASE
    | {
        "down_block_types": (CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP),
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "attention_head_dim": 4,
    },
    # As Stable Diffusion 2: linear projections, heads by level.
    "sd2": BASE
    | {
        "down_block_types": (CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "one level, deep transformers, other time embedding": BASE
    | {
        "in_channels": 3,
        "down_block_types": (CROSS,),
        "up_block_types": (CROSS_UP,),
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}


def case(name: str, size: tuple[int, int] = (8, 8)):
    config = CONFIGS[name]
    model = diffusers.UNet2DConditionModel(sample_size=8, **config).eval()
    randomise(model, 1)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((3, config["in_channels"], *size)).astype(np.float32)
    text = rng.standard_normal((3, 5, 12)).astype(np.float32)
    return model, UNet2DCondition(UNetConfig(**config)), sample, np.array([0, 17, 999]), text


def ours(module, params, sample, time, text):
    return module.apply({"params": params}, jnp.array(sample.transpose(0, 2, 3, 1)), jnp.array(time), jnp.array(text))


@pytest.mark.parametrize(("name", "size"), [(n, (8, 8)) for n in CONFIGS] + [("sd1", (6, 10)), ("sd1", (7, 5))])
def test_outputs_equal_diffusers(name, size):
    """1e-4: about 40 layers of float32 sums in another order."""
    model, module, sample, time, text = case(name, size)
    with torch.no_grad():
        expected = model(torch.tensor(sample), torch.tensor(time), torch.tensor(text)).sample.numpy()
    found = ours(module, torch_params(model), sample, time, text)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_equal_autograd(remat):
    """1e-3 of each gradient's largest entry: sums over the image in another order."""
    model, module, sample, time, text = case("sd1")
    (model(torch.tensor(sample), torch.tensor(time), torch.tensor(text)).sample ** 2).mean().backward()
    expected = torch_gradients(model)
    module = UNet2DCondition(UNetConfig(**CONFIGS["sd1"], remat=remat))
    found = jax.jit(jax.grad(lambda p: jnp.mean(ours(module, p, sample, time, text) ** 2)))(torch_params(model))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), found, expected), is_leaf=lambda x: isinstance(x, tuple)
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_initial_parameters_have_the_names_and_shapes_of_diffusers():
    model, module, sample, time, text = case("sd1")
    args = (jnp.array(sample.transpose(0, 2, 3, 1)), jnp.array(time), jnp.array(text))
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *args)["params"])
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(made) == shapes(torch_params(model))


def test_bfloat16_computes_in_bfloat16_and_reports_in_float32():
    _, _, sample, time, text = case("sd2")
    module = UNet2DCondition(UNetConfig(**CONFIGS["sd2"], dtype="bfloat16"))
    args = (jnp.array(sample.transpose(0, 2, 3, 1)), jnp.array(time), jnp.array(text))
    params = module.init(jax.random.key(0), *args)
    text_of = str(jax.make_jaxpr(module.apply)(params, *args))
    convolutions = [line for line in text_of.splitlines() if "conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)
    assert module.apply(params, *args).dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D",) * 3}, "unknown down_block_types 'AttnDownBlock2D'"),
        ({"block_out_channels": (8, 16)}, "3 down_block_types but 2"),
        ({"attention_head_dim": (2, 4)}, "2 attention_head_dim for 3"),
        ({"norm_num_groups": 3}, "must divide 8 channels"),
    ],
)
def test_configurations_it_cannot_build_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**CONFIGS["sd1"] | change)
