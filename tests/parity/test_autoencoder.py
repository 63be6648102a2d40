"""Our image autoencoder against diffusers' AutoencoderKL, float32, on small random models."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, scale_latents, unscale_latents
from tests.parity.convert_diffusion import randomise, torch_gradients, torch_params

SHAPE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {
    # As Stable Diffusion 1, 2 and XL.
    "quant": SHAPE | {"latent_channels": 4},
    # As Stable Diffusion 3.
    "no quant": SHAPE | {"latent_channels": 6, "use_quant_conv": False, "use_post_quant_conv": False},
    "three levels, no attention": {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 2,
        "mid_block_add_attention": False,
    },
}


def case(name: str, size: tuple[int, int]):
    config = CONFIGS[name]
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    model = diffusers.AutoencoderKL(**config, **blocks).eval()
    randomise(model, 3)
    images = np.random.default_rng(0).uniform(-1, 1, (2, config.get("in_channels", 3), *size)).astype(np.float32)
    return model, AutoencoderKL(AutoencoderConfig(**config)), images


def last(x):
    return jnp.array(np.asarray(x).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("name", "size"), [*((n, (16, 16)) for n in CONFIGS), ("quant", (10, 7))])
def test_moments_and_pixels_equal_diffusers(name, size):
    """1e-4: some twenty layers of float32 sums in another order."""
    model, module, images = case(name, size)
    with torch.no_grad():
        posterior = model.encode(torch.tensor(images)).latent_dist
        latents = posterior.mean + 0.5
        pixels = model.decode(latents).sample
    params = {"params": torch_params(model)}
    run = lambda x, z: (*module.apply(params, x, method="encode"), module.apply(params, z, method="decode"))  # noqa: E731
    mean, logvar, decoded = jax.jit(run)(last(images), last(latents))
    for found, expected in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, pixels)):
        assert expected.abs().max() > 0.1
        np.testing.assert_allclose(found, last(expected), rtol=0, atol=1e-4)


def test_the_log_variance_is_clipped_as_diffusers_clips_it():
    model, module, images = case("quant", (8, 8))
    with torch.no_grad():
        model.quant_conv.bias[4:] += torch.tensor([-100.0, 100.0, 0.0, 0.0])
        posterior = model.encode(torch.tensor(images)).latent_dist
    params = {"params": torch_params(model)}
    _, logvar = jax.jit(lambda x: module.apply(params, x, method="encode"))(last(images))
    assert set(np.unique(logvar[..., :2])) == {-30.0, 20.0}
    np.testing.assert_allclose(logvar, last(posterior.logvar), rtol=0, atol=1e-4)


def test_gradients_equal_autograd():
    """1e-3 of each gradient's largest entry: sums over the image in another order."""
    model, module, images = case("quant", (8, 8))
    posterior = model.encode(torch.tensor(images)).latent_dist
    ((model.decode(posterior.mean).sample ** 2).mean() + (posterior.logvar**2).mean()).backward()

    def loss(p):
        mean, logvar = module.apply({"params": p}, last(images), method="encode")
        pixels = module.apply({"params": p}, mean, method="decode")
        return jnp.mean(pixels**2) + jnp.mean(logvar**2)

    found, expected = jax.jit(jax.grad(loss))(torch_params(model)), torch_gradients(model)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The gradient of to_k's bias is 0 in exact arithmetic.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-6)


def test_initial_parameters_have_the_names_and_shapes_of_diffusers():
    model, module, images = case("quant", (8, 8))
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), last(images))["params"])
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, torch_params(model))


def test_scaling_is_that_of_the_pipelines_and_its_inverse():
    latents = jnp.linspace(-3, 3, 24).reshape(1, 2, 3, 4)
    config = AutoencoderConfig(scaling_factor=1.5305, shift_factor=0.0609)
    np.testing.assert_allclose(scale_latents(config, latents), (np.asarray(latents) - 0.0609) * 1.5305, atol=1e-6)
    np.testing.assert_allclose(unscale_latents(config, scale_latents(config, latents)), latents, atol=1e-6)
    np.testing.assert_allclose(scale_latents(AutoencoderConfig(), latents), np.asarray(latents) * 0.18215, atol=1e-6)


def test_bfloat16_reports_in_float32():
    _, _, images = case("quant", (8, 8))
    module = AutoencoderKL(AutoencoderConfig(**CONFIGS["quant"], dtype="bfloat16"))
    outputs = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), last(images), method="encode")[0])
    assert [x.dtype for x in outputs] == [jnp.float32] * 2
    assert jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), last(images))[0]).dtype == jnp.float32


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="norm_num_groups=3 must divide 8 channels"):
        AutoencoderConfig(**SHAPE | {"norm_num_groups": 3})
