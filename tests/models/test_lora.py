"""LoRA's factors: where they go, that every one is read, and what they compute, against NumPy and the merged tree."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.config import Precision
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.layers import Dense
from sysdpo_jax.models.lora import (
    TRAINABLE,
    LoRA,
    LoRAError,
    add_lora,
    is_lora,
    merge_lora,
    strip_lora,
)
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.t5 import T5Config, T5Encoder
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig

DECODER = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)
MMDIT = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
)
T5 = T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
CLIP = CLIPTextConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 6))
NOISY = (
    np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32),
    np.array([3, 700]),
    np.random.default_rng(2).normal(size=(2, 5, 12)).astype(np.float32),
)
FAMILIES = {
    "decoder": (Decoder(DECODER), (TOKENS,)),
    "decoder, rematerialised": (Decoder(dataclasses.replace(DECODER, remat="full")), (TOKENS,)),
    "unet": (UNet2DCondition(UNET), NOISY),
    "mmdit": (MMDiT(MMDIT), (*NOISY, np.random.default_rng(3).normal(size=(2, 10)).astype(np.float32))),
    "t5": (T5Encoder(T5), (TOKENS,)),
    "clip": (CLIPTextEncoder(CLIP), (TOKENS,)),
}
# All that can be targeted; the head is in no set.
EVERYTHING = {"decoder": ("all_linear", "lm_head")}
# The text's queries in an MMDiT's last block, whose answers for the text nobody reads.
UNREAD = "transformer_blocks_1/attn/add_q_proj/lora_b"
KEY = jax.random.key(0)


@functools.cache
def abstract(family):
    module, inputs = FAMILIES[family]
    return jax.eval_shape(lambda *x: module.init(KEY, *x)["params"], *inputs)


def random_params(family):
    """Normal values off their initial ones, weights of the norms around 1."""
    rng = np.random.default_rng(3)

    def leaf(path, x):
        scale = 0.1 if x.ndim < 2 else x.shape[-2] ** -0.5
        return jax.device_put((scale * rng.normal(size=x.shape) + ("weight" in str(path[-1]))).astype(x.dtype))

    return jax.tree_util.tree_map_with_path(leaf, abstract(family))


def targeted(family, targets):
    made = jax.eval_shape(lambda tree: add_lora(tree, LoRA(2, 4.0, targets), KEY), abstract(family))
    return sorted(path.removesuffix("/lora_a") for path in flatten_dict(made, sep="/") if path.endswith("/lora_a"))


def randomise(params):
    """Every lora_b off zero."""
    flat = flatten_dict(params, sep="/")
    for number, path in enumerate(sorted(flat)):
        if path.endswith("lora_b"):
            drawn = np.random.default_rng(number).normal(size=flat[path].shape)
            flat[path] = jax.device_put((0.3 * drawn).astype(flat[path].dtype))
    return unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, inputs):
    return module.apply({"params": params}, *inputs)


def test_named_sets_find_the_layers_of_each_family():
    blocks = [
        "down_blocks_0/attentions_0",
        "mid_block/attentions_0",
        "up_blocks_1/attentions_0",
        "up_blocks_1/attentions_1",
    ]
    unet = [f"{block}/transformer_blocks" for block in blocks]
    projections = ("to_k", "to_out_0", "to_q", "to_v")
    assert targeted("decoder", "attention") == [f"layers/self_attn/{n}_proj" for n in "koqv"]
    assert targeted("decoder", "mlp") == [f"layers/mlp/{n}_proj" for n in ("down", "gate", "up")]
    assert targeted("decoder", "all_linear") == targeted("decoder", ("attention", "mlp"))
    assert targeted("clip", "attention") == [
        f"layers_{i}/self_attn/{n}" for i in (0, 1) for n in ("k_proj", "out_proj", "q_proj", "v_proj")
    ]
    assert targeted("clip", "mlp") == [f"layers_{i}/mlp/fc{n}" for i in (0, 1) for n in (1, 2)]
    assert targeted("unet", "cross_attention") == [f"{b}/attn2/{n}" for b in unet for n in projections]
    assert targeted("unet", "attention") == [f"{b}/attn{i}/{n}" for b in unet for i in (1, 2) for n in projections]
    assert targeted("unet", "mlp") == [f"{b}/ff/{n}" for b in unet for n in ("net_0/proj", "net_2")]
    assert targeted("unet", r"time_embedding|mid_block.*proj_in$") == [
        "mid_block/attentions_0/proj_in", "time_embedding/linear_1", "time_embedding/linear_2"
    ]  # fmt: skip
    assert not [path for path in targeted("unet", "all_linear") if "conv" in path]
    joint = ("add_k_proj", "add_q_proj", "add_v_proj", *("to_add_out", "to_k", "to_out_0", "to_q", "to_v"))
    first = [path for path in targeted("mmdit", "attention") if path.startswith("transformer_blocks_0/attn/")]
    assert first == [f"transformer_blocks_0/attn/{name}" for name in joint]
    assert len(targeted("mmdit", "attention")) == 8 + 4 + 7  # joint, dual, joint without to_add_out
    assert len(targeted("mmdit", "mlp")) == 4 + 2
    assert targeted("t5", "attention") == [
        f"encoder/block_{i}/layer_0/SelfAttention/{n}" for i in (0, 1) for n in "koqv"
    ]
    assert targeted("t5", "mlp") == [
        f"encoder/block_{i}/layer_1/DenseReluDense/{n}" for i in (0, 1) for n in ("wi_0", "wi_1", "wo")
    ]


# Of a U-Net and an MMDiT the compilation takes a minute.
COMPILED = [pytest.param(name, marks=pytest.mark.slow) if name in ("unet", "mmdit") else name for name in FAMILIES]


@pytest.mark.parametrize("family", COMPILED)
def test_every_inserted_factor_is_read(family):
    """The gradient by lora_b, taken at its initial zeros, is not zero in any layer that got factors."""
    module, inputs = FAMILIES[family]
    params = add_lora(random_params(family), LoRA(2, 4.0, EVERYTHING.get(family.split(",")[0], "all_linear")), KEY)
    weights = np.random.default_rng(4).normal(size=jax.eval_shape(run, module, params, inputs).shape)
    gradients = jax.jit(jax.grad(lambda p, x: jnp.sum(weights * module.apply({"params": p}, *x))))(params, inputs)
    flat = flatten_dict(gradients, sep="/")
    factors = {path: leaf for path, leaf in flat.items() if path.endswith("lora_b")}
    assert len(factors) == sum(path.endswith("/kernel") and leaf.ndim < 4 for path, leaf in flat.items())
    for path, leaf in factors.items():
        layers = leaf if leaf.ndim == 3 else leaf[None]
        assert all((np.abs(layer).max() > 1e-5) == (path != UNREAD) for layer in layers), path
        assert not np.any(flat[path.replace("lora_b", "lora_scale")]), "the scale is a constant"


@pytest.mark.parametrize("family", COMPILED)
def test_factors_compute_what_the_merged_kernels_do(family):
    """1e-4: float32 sums in another order. At first, with lora_b zero, nothing changes but how XLA fuses: 1e-5."""
    module, inputs = FAMILIES[family]
    base = random_params(family)
    params = add_lora(base, LoRA(3, 2.0, EVERYTHING.get(family.split(",")[0], "all_linear")), KEY)
    before = run(module, base, inputs)
    np.testing.assert_allclose(run(module, params, inputs), before, rtol=0, atol=1e-5)
    params = randomise(params)
    adapted, merged = run(module, params, inputs), run(module, merge_lora(params), inputs)
    assert np.abs(adapted - before).max() > 0.1
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_dense_layer_is_the_formula(dtype, atol):
    """float32 rounding of values of order 1, and bfloat16's, whose last place is 0.008 there."""
    dense = Dense(Precision(dtype=dtype), 7)
    rng = np.random.default_rng(5)
    leaves = {"kernel": (5, 7), "bias": (7,), "lora_a": (5, 2), "lora_b": (2, 7)}
    values = {name: rng.normal(size=shape) / shape[0] ** 0.5 for name, shape in leaves.items()} | {"lora_scale": 1.5}
    x = rng.normal(size=(3, 4, 5))
    found = dense.apply({"params": jax.tree.map(jnp.float32, values)}, jnp.float32(x))
    expected = x @ (values["kernel"] + 1.5 * values["lora_a"] @ values["lora_b"]) + values["bias"]
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float64(found), expected, rtol=0, atol=atol)


def test_initial_factors():
    base = random_params("decoder")
    params = add_lora(base, LoRA(8, 12.0, ("attention", "mlp")), KEY, param_dtype="bfloat16")
    flat = flatten_dict(params, sep="/")
    a, b, scale = (flat[f"layers/mlp/down_proj/lora_{name}"] for name in ("a", "b", "scale"))
    assert (a.shape, b.shape, scale.shape) == ((2, 24, 8), (2, 8, 16), (2,))
    assert (a.dtype, b.dtype, scale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(scale, 1.5)
    assert not np.any(b)
    bound = 24**-0.5  # Kaiming's sqrt(6 / ((1 + 5) fan_in))
    assert 0.95 * bound < np.abs(np.float32(a)).max() <= 1.01 * bound
    assert abs(np.float32(a).std() - bound / 3**0.5) < 0.05 * bound
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(flat["layers/self_attn/q_proj/lora_a"], flat["layers/self_attn/k_proj/lora_a"])
    assert {path for path in flat if re.search(TRAINABLE, path)} == {p for p in flat if is_lora(p) and "scale" not in p}


def test_the_base_is_shared_and_comes_back():
    base = random_params("clip")
    params = add_lora(base, LoRA(2, 2.0), KEY)
    again = add_lora(params, LoRA(4, 2.0, "mlp"), KEY)  # other layers may have another rank
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, strip_lora(again), base))
    assert jax.tree.structure(merge_lora(again)) == jax.tree.structure(base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("query", r"'query' finds no dense layer\. Dense layers here are.*down_blocks_0/attentions_0.*cross_attention"),
        ("conv_in", r"'conv_in' finds no dense layer, only what cannot carry factors \(conv_in\)"),
        (("attention", "gate_proj"), "'gate_proj' finds no dense layer"),
        ("(", "no regular expression"),
        ((), "no targets"),
    ],
)
def test_targets_it_cannot_take_are_refused(targets, message):
    with pytest.raises(LoRAError, match=message):
        targeted("unet", targets)


def test_embeddings_numbers_and_taken_layers_are_refused():
    with pytest.raises(LoRAError, match=r"only what cannot carry factors \(embed_tokens\)"):
        targeted("decoder", "embed_tokens")
    with pytest.raises(LoRAError, match="none at all"):
        add_lora({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, LoRA(1, 1.0, ".*"), KEY)
    with pytest.raises(LoRAError, match="layers/self_attn/k_proj carries LoRA already"):
        add_lora(add_lora(random_params("decoder"), LoRA(2, 2.0), KEY), LoRA(2, 2.0, "all_linear"), KEY)
    for rank, alpha in ((0, 1.0), (1, 0.0)):
        with pytest.raises(LoRAError, match="must be positive"):
            LoRA(rank, alpha)
