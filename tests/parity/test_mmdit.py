"""Our MMDiT against diffusers' SD3Transformer2DModel, float32, on small random models."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid

from sysdpo_jax.models import mmdit
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig, position_table, position_waves
from tests.parity.convert_sd3 import torch_gradients, torch_params

BASE = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 9,
    "out_channels": 4,
    "pos_embed_max_size": 7,
}
CONFIGS = {
    "sd3": BASE,
    "sd3.5 large": BASE | {"qk_norm": "rms_norm"},
    "sd3.5 medium": BASE | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "other channels, patches of 1, dual attention at the end": BASE
    | {"in_channels": 3, "out_channels": 5, "patch_size": 1, "dual_attention_layers": (1,)},
}
SIZES = [(12, 12), (6, 10), (14, 4)]


def randomised(config, seed=1):
    """Parameters far from their start, where gates, shifts and biases are too small to show a mistake."""
    model = diffusers.SD3Transformer2DModel(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def inputs(config, size, rows=3):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    sample, text, pooled = draw(rows, config["in_channels"], *size), draw(rows, 5, 10), draw(rows, 9)
    return sample, np.array([0.0, 417.3, 1000.0], np.float32)[:rows], text, pooled


def theirs(model, sample, time, text, pooled):
    sample, time, text, pooled = map(torch.tensor, (sample, time, text, pooled))
    return model(sample, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample.permute(
        0, 2, 3, 1
    )


def ours(module, params, sample, time, text, pooled):
    sample = jnp.array(sample.transpose(0, 2, 3, 1))
    return module.apply({"params": params}, sample, jnp.array(time), jnp.array(text), jnp.array(pooled))


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, (12, 12)) for name in ("sd3", "sd3.5 large", "sd3.5 medium")]
    + [("sd3.5 medium", size) for size in SIZES[1:]]
    + [("other channels, patches of 1, dual attention at the end", (7, 4))],
)
def test_outputs_equal_diffusers(name, size):
    """1e-4: about 30 layers of float32 sums in another order. Whole and cropped tables, square and not."""
    model, args = randomised(CONFIGS[name]), inputs(CONFIGS[name], size)
    with torch.no_grad():
        expected = theirs(model, *args).numpy()
    found = jax.jit(lambda p: ours(MMDiT(MMDiTConfig(**CONFIGS[name])), p, *args))(torch_params(model))
    assert found.dtype == jnp.float32
    assert 1 < np.abs(expected).max() < 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def preference_loss(errors, reference, softplus):
    """-log sigmoid(-(w / 2) * (winner's error - loser's, each less the reference's)) with w = 3, mean over pairs.

    The first half of the rows are winners, the second their losers.
    """
    winner, loser = (errors[rows] - reference[rows] for rows in (slice(0, 2), slice(2, 4)))
    return softplus(1.5 * (winner - loser)).mean()


@pytest.mark.parametrize(("name", "remat"), [("sd3", None), ("sd3.5 medium", "full")])
def test_gradients_of_a_preference_loss_equal_autograd(name, remat):
    """1e-3 of each gradient's largest entry: sums over the image in another order."""
    config = CONFIGS[name]
    model = randomised(config)
    rng = np.random.default_rng(2)
    clean = rng.standard_normal((4, 4, 4, 6)).astype(np.float32)
    reference = rng.uniform(0.5, 1.5, 4).astype(np.float32)
    # Both sides of a pair have the same noise, time and text.
    noise, time, text, pooled = (np.concatenate([x, x]) for x in inputs(config, (4, 6), rows=2))
    t = (time / 1000 + 0.2)[:, None, None, None]
    args, velocity = ((1 - t) * clean + t * noise, time, text, pooled), (noise - clean).transpose(0, 2, 3, 1)

    errors = ((theirs(model, *args) - torch.tensor(velocity)) ** 2).mean((1, 2, 3))
    expected_loss = preference_loss(errors, torch.tensor(reference), torch.nn.functional.softplus)
    expected_loss.backward()

    module = MMDiT(MMDiTConfig(**config, remat=remat))

    def loss(p):
        errors = jnp.mean((ours(module, p, *args) - velocity) ** 2, axis=(1, 2, 3))
        return preference_loss(errors, reference, jax.nn.softplus)

    value, found = jax.jit(jax.value_and_grad(loss))(torch_params(model))
    np.testing.assert_allclose(value, expected_loss.item(), rtol=1e-4)
    expected = torch_gradients(model)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(np.abs(b).max() for b in jax.tree.leaves(expected))
    assert largest > 1e-2
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), found, expected), is_leaf=lambda x: isinstance(x, tuple)
    ):
        # A key's bias shifts all scores alike and has no gradient in exact arithmetic, without a norm.
        atol = 1e-3 * np.abs(b).max() + 1e-7 * largest
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("sample_size", "patch_size", "most", "heads"), [(12, 2, 7, 3), (16, 2, 24, 4), (9, 1, 20, 2), (128, 2, 48, 2)]
)
def test_a_new_models_table_of_positions_is_diffusers_bit_for_bit(sample_size, patch_size, most, heads):
    config = MMDiTConfig(
        sample_size=sample_size,
        patch_size=patch_size,
        pos_embed_max_size=most,
        num_attention_heads=heads,
        attention_head_dim=8,
        caption_projection_dim=8 * heads,
    )
    buffer = PatchEmbed(sample_size, sample_size, patch_size, 4, 8 * heads, pos_embed_max_size=most).pos_embed
    image = jnp.zeros((1, patch_size, patch_size, 4))
    found = jax.jit(mmdit.PatchEmbed(config).init)(jax.random.key(0), image)["params"]["pos_embed"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, buffer.numpy())
    np.testing.assert_array_equal(position_table(config), buffer.numpy())


@pytest.mark.parametrize(("most", "heads"), [(192, 24), (192, 38), (384, 24)])
def test_positions_of_the_released_sizes_are_those_of_diffusers_bit_for_bit(most, heads):
    """Row by row: whole tables are hundreds of megabytes."""
    config = MMDiTConfig(pos_embed_max_size=most, num_attention_heads=heads, caption_projection_dim=64 * heads)
    grid = torch.arange(most, dtype=torch.float32) / (most / 64)
    expected = get_1d_sincos_pos_embed_from_grid(32 * heads, grid).float().numpy()
    np.testing.assert_array_equal(position_waves(config), expected)


def test_a_trace_computes_no_table():
    """Of the 384 x 384 x 1536 floats it holds the waves alone, 384 x 768 for the columns and for the rows."""
    config = MMDiTConfig(pos_embed_max_size=384, num_attention_heads=24, caption_projection_dim=1536)
    traced = jax.make_jaxpr(lambda: position_table(config))()
    assert traced.out_avals[0].shape == (1, 384**2, 1536)
    assert sum(constant.nbytes for constant in traced.consts) == 2 * 384 * 768 * 4


@pytest.mark.parametrize(("size", "dtype"), [*zip(SIZES, (torch.float32, torch.bfloat16, torch.float32), strict=True)])
def test_whatever_table_is_stored_is_added(dtype, size):
    """1e-4 as above; a rounded table is added in float32."""
    config = CONFIGS["sd3"]
    model, args = randomised(config), inputs(config, size)
    params = torch_params(model)
    with torch.no_grad():
        before = theirs(model, *args).numpy()
        table = torch.randn(model.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        model.pos_embed.pos_embed = table
        expected = theirs(model, *args).numpy()
    params["pos_embed"]["pos_embed"] = jnp.array(table.float().numpy(), str(dtype).removeprefix("torch."))
    found = jax.jit(lambda p: ours(MMDiT(MMDiTConfig(**config)), p, *args))(params)
    assert np.abs(before - expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_reports_in_float32():
    config = CONFIGS["sd3.5 medium"]
    module, args = MMDiT(MMDiTConfig(**config, dtype="bfloat16")), inputs(config, (4, 4))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *_arrays(args))["params"])
    made = jax.make_jaxpr(lambda p: ours(module, p, *args))(params)
    lines = [line for line in str(made).splitlines() if "dot_general[" in line or "conv_general_dilated[" in line]
    # Scores of the three attentions are summed in float32 from bfloat16 operands.
    assert sum(":f32[" in line for line in lines) == 3
    assert sum(":bf16[" in line for line in lines) == len(lines) - 3
    assert made.out_avals[0].dtype == jnp.float32


def test_parameters_follow_param_dtype():
    module = MMDiT(MMDiTConfig(**CONFIGS["sd3.5 medium"], param_dtype="bfloat16"))
    args = _arrays(inputs(CONFIGS["sd3"], (4, 4)))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def _arrays(args):
    sample, *others = args
    return jnp.array(sample.transpose(0, 2, 3, 1)), *map(jnp.array, others)


@pytest.mark.parametrize(("size", "said"), [((5, 4), "5 x 4"), ((4, 16), "at most 14")])
def test_latents_that_have_no_positions_are_refused(size, said):
    module = MMDiT(MMDiTConfig(**BASE))
    with pytest.raises(ValueError, match=said):
        module.init(jax.random.key(0), *_arrays(inputs(BASE, size)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 4}, "patch_size must be 1 or 2, not 4"),
        ({"attention_head_dim": 7, "caption_projection_dim": 21}, "= 21 must be a multiple of 4"),
        ({"caption_projection_dim": 16}, "caption_projection_dim=16 must be"),
        ({"qk_norm": "layer_norm"}, "unknown qk_norm 'layer_norm'"),
        ({"dual_attention_layers": (1, 2)}, "dual_attention_layers has 2, but there are 2"),
    ],
)
def test_configurations_it_cannot_build_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**BASE | change)
