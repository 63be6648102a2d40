"""Our U-Net against diffusers' UNet2DConditionModel, float32, on small random models."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sysdpo_jax.models.layers import gelu
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from sysdpo_jax.trees import by_path
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
        "layers_per_block": 1,
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
    # As Stable Diffusion XL: transformers only where they are deep, sizes and a pooled text beside the time.
    "sdxl": BASE
    | {
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "transformer_layers_per_block": (3, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    },
    "one level, deep transformers, other time embedding": BASE
    | {
        "in_channels": 3,
        "down_block_types": (CROSS,),
        "up_block_types": (CROSS_UP,),
        "block_out_channels": (8,),
        "layers_per_block": 2,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}


def case(name: str, size: tuple[int, int] = (8, 8), **changes):
    """diffusers' model, our module, and the inputs under diffusers' names and in its layout."""
    config = CONFIGS[name] | changes
    model = diffusers.UNet2DConditionModel(sample_size=8, **config).eval()
    randomise(model, 1)
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((3, config["in_channels"], *size)).astype(np.float32),
        "timestep": np.array([0, 17, 999]),
        "encoder_hidden_states": rng.standard_normal((3, 5, 12)).astype(np.float32),
    }
    if "addition_embed_type" in config:
        sizes = [[1024, 768, 0, 0, 512, 512], [64, 64, 3, 0, 64, 32], [2, 1, 0, 0, 1, 2]]
        inputs["text_embeds"] = rng.standard_normal((3, 10)).astype(np.float32)
        inputs["time_ids"] = np.array(sizes, np.float32)
    return model, UNet2DCondition(UNetConfig(**config)), inputs


def theirs(model, inputs):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    added = {name: tensors.pop(name) for name in ("text_embeds", "time_ids") if name in tensors}
    return model(**tensors, added_cond_kwargs=added).sample


def arguments(inputs):
    sample, *others = map(jnp.array, inputs.values())
    return (sample.transpose(0, 2, 3, 1), *others)


def assert_gradients_equal(found, expected):
    """1e-3 of each gradient's largest entry: sums over the image in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = jax.tree.map(lambda a, b: (a, b), found, expected)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(pairs, is_leaf=lambda x: isinstance(x, tuple)):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((n, (8, 8)) for n in CONFIGS if n != "sd1"),
        ("sd1", (7, 5)),
        # Other sizes of the same networks.
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("sd1", (8, 8)), ("sdxl", (6, 9)))),
    ],
)
def test_outputs_equal_diffusers(name, size):
    """1e-4: about 40 layers of float32 sums in another order."""
    model, module, inputs = case(name, size)
    with torch.no_grad():
        expected = theirs(model, inputs).numpy()
    found = jax.jit(module.apply)({"params": torch_params(model)}, *arguments(inputs))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_gradients_with_recomputed_activations_equal_autograd():
    """On two levels, with convolutional projections."""
    changes = {"use_linear_projection": False}
    model, _, inputs = case("sd2", **changes)
    module = UNet2DCondition(UNetConfig(**CONFIGS["sd2"] | changes, remat="full"))
    (theirs(model, inputs) ** 2).mean().backward()
    args = arguments(inputs)
    found = jax.jit(jax.grad(lambda p: jnp.mean(module.apply({"params": p}, *args) ** 2)))(torch_params(model))
    assert_gradients_equal(found, torch_gradients(model))


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_recomputation_is_kept_apart_where_no_loop_does_it(name):
    """The compiler takes a scan of one block apart, and would merge what the backward pass computes again.

    Residual blocks have one barrier each; a transformer of depth 1 has one, of more it is a loop.
    """
    _, _, inputs = case(name)
    module, args = UNet2DCondition(UNetConfig(**CONFIGS[name], remat="full")), arguments(inputs)
    params = jax.eval_shape(module.init, jax.random.key(0), *args)
    program = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, *args)))).lower(params).as_text()
    leaves = by_path(params)
    residual = [path for path in leaves if path.endswith("conv1/kernel")]
    depths = [leaf.shape[0] for path, leaf in leaves.items() if path.endswith("attn1/to_q/kernel")]
    assert 1 in depths
    assert program.count("optimization_barrier") == len(residual) + depths.count(1)


@pytest.mark.slow
def test_diffusion_dpo_gradients_equal_autograd():
    """-log sigmoid(-beta / 2 (policy's error difference - reference's)), arXiv 2311.12908, equation 14.

    Winner and loser share caption, time and noise; errors are means over the image.
    """
    beta, rows = 20.0, 3
    model, module, inputs = case("sdxl")
    reference, _, _ = case("sdxl")
    randomise(reference, 4)
    rng = np.random.default_rng(1)
    loser = inputs | {"sample": rng.standard_normal(inputs["sample"].shape).astype(np.float32)}
    noise = rng.standard_normal(inputs["sample"].shape).astype(np.float32)

    def torch_difference(m):
        won, lost = (((theirs(m, side) - torch.tensor(noise)) ** 2).mean(dim=(1, 2, 3)) for side in (inputs, loser))
        return won - lost

    with torch.no_grad():
        fixed = torch_difference(reference)
    margin = torch_difference(model) - fixed
    assert margin.abs().max() > 1e-3
    torch_loss = -torch.nn.functional.logsigmoid(-0.5 * beta * margin).mean()
    torch_loss.backward()

    def difference(p):
        sides = [jnp.concatenate(pair) for pair in zip(arguments(inputs), arguments(loser), strict=True)]
        target = jnp.tile(jnp.array(noise.transpose(0, 2, 3, 1)), (2, 1, 1, 1))
        errors = jnp.mean((module.apply({"params": p}, *sides) - target) ** 2, axis=(1, 2, 3))
        return errors[:rows] - errors[rows:]

    def loss(p, r):
        return -jnp.mean(jax.nn.log_sigmoid(-0.5 * beta * (difference(p) - difference(r))))

    value, found = jax.jit(jax.value_and_grad(loss))(torch_params(model), torch_params(reference))
    np.testing.assert_allclose(value, torch_loss.item(), rtol=1e-4)
    assert_gradients_equal(found, torch_gradients(model))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_initial_parameters_have_the_names_and_shapes_of_diffusers(name):
    model, module, inputs = case(name)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments(inputs))["params"])
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(made) == shapes(torch_params(model))


def test_bfloat16_computes_in_bfloat16_and_reports_in_float32():
    _, _, inputs = case("sdxl")
    module, args = UNet2DCondition(UNetConfig(**CONFIGS["sdxl"], dtype="bfloat16")), arguments(inputs)
    params = jax.eval_shape(module.init, jax.random.key(0), *args)
    lines = str(jax.make_jaxpr(module.apply)(params, *args)).splitlines()
    convolutions = [line for line in lines if "conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)
    assert jax.eval_shape(module.apply, params, *args).dtype == jnp.float32


def test_the_added_embedding_and_its_inputs_go_together():
    _, module, inputs = case("sdxl")
    *plain, pooled, sizes = arguments(inputs)
    init = lambda model, *args: jax.eval_shape(model.init, jax.random.key(0), *args)  # noqa: E731
    with pytest.raises(ValueError, match="needs both text_embeds and time_ids"):
        init(module, *plain)
    with pytest.raises(ValueError, match="needs both text_embeds and time_ids"):
        init(module, *plain, pooled)
    with pytest.raises(ValueError, match=r"width 10 and 5 time_ids of 4 make 30, but .*_input_dim=34"):
        init(module, *plain, pooled, sizes[:, :5])
    with pytest.raises(ValueError, match="need addition_embed_type='text_time'"):
        init(case("sd1")[1], *plain, pooled, sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D",) * 3}, "unknown down_block_types 'AttnDownBlock2D'"),
        ({"block_out_channels": (8, 16)}, "3 down_block_types but 2"),
        ({"attention_head_dim": (2, 4)}, "2 attention_head_dim for 3"),
        ({"transformer_layers_per_block": (1, 2)}, "2 transformer_layers_per_block for 3"),
        ({"norm_num_groups": 3}, "must divide 8 channels"),
        ({"addition_embed_type": "image"}, "unknown addition_embed_type 'image'"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 4}, "which are 4 and None"),
    ],
)
def test_configurations_it_cannot_build_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**CONFIGS["sd1"] | change)


def test_gelu_and_its_slope_are_pytorchs():
    """To float32's rounding of 1 + erf, at most |x| / 2 times 1.2e-7; against float64."""
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    wanted = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.gelu(wanted)
    value.sum().backward()
    np.testing.assert_allclose(gelu(jnp.asarray(x)), value.detach().numpy(), rtol=0, atol=1e-6)
    slopes = jax.vmap(jax.grad(gelu))(jnp.asarray(x))
    np.testing.assert_allclose(slopes, wanted.grad.numpy(), rtol=0, atol=1e-6)


def test_gelu_in_bfloat16_keeps_its_small_results():
    """1 + erf in bfloat16 would be wrong by half of them at -3."""
    x = jnp.linspace(-3, -0.5, 100, dtype=jnp.bfloat16)
    wanted = torch.nn.functional.gelu(torch.tensor(np.asarray(x, np.float64))).numpy()
    np.testing.assert_allclose(np.asarray(gelu(x), np.float64), wanted, rtol=0.05)
