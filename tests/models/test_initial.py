"""Parameters without the forward pass are those of Flax's own `init`, made by few programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sysdpo_jax.models import (
    AutoencoderConfig,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    Decoder,
    DecoderConfig,
    MMDiT,
    MMDiTConfig,
    UNet2DCondition,
    UNetConfig,
)
from sysdpo_jax.models.initial import fresh_params
from sysdpo_jax.models.t5 import T5Config, T5Encoder
from tests.models.programs import compiling

KEY = jax.random.key(3)
DECODER = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 6}
BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
BLOCKS |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2)}
PATCHES = {"in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2}
PATCHES |= {"joint_attention_dim": 6, "caption_projection_dim": 8, "pooled_projection_dim": 5}
SIZED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
SIZED |= {"projection_class_embeddings_input_dim": 5 + 6 * 4}


def float32(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


TOKENS = [jax.ShapeDtypeStruct((1, 2), jnp.int32)]
MODULES = {
    "decoder": (Decoder(DecoderConfig(**DECODER, **HEADS, qk_norm=True, qkv_bias=True)), TOKENS),
    "decoder, remat": (Decoder(DecoderConfig(**DECODER, **HEADS, remat="full", param_dtype="bfloat16")), TOKENS),
    "unet": (
        UNet2DCondition(UNetConfig(**UNET, **BLOCKS, **SIZED, remat="full")),
        float32((1, 8, 8, 4), (1,), (1, 3, 6), (1, 5), (1, 6)),
    ),
    "mmdit": (MMDiT(MMDiTConfig(**PATCHES)), float32((1, 8, 8, 4), (1,), (1, 3, 6), (1, 5))),
    "clip": (
        CLIPTextEncoder(CLIPTextConfig(vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2)),
        TOKENS,
    ),
    "t5": (T5Encoder(T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)), TOKENS),
    "autoencoder": (
        AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=2)),
        float32((1, 16, 16, 3)),
    ),
}


def same(found, wanted, bits=4.0):
    """The same draws: equal but for `bits` times the last bit of the largest.

    Flax's own differ so much between a program of one draw and one of many, which rounds a scale or a multiplication
    and addition once instead of twice before the inverse error function. Other draws would differ in the first digit.
    """
    found, wanted = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        ours, theirs = (np.asarray(x, np.float32) for x in (found[path], leaf))
        limit = bits * float(jnp.finfo(leaf.dtype).eps) * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=path)


@pytest.mark.parametrize("name", MODULES)
def test_the_values_are_those_of_flax(name):
    module, inputs = MODULES[name]
    alone = name == "autoencoder"
    # Without stacked layers every draw is a program of its own in Flax's too, unless the whole is one.
    init = module.init if alone else jax.jit(module.init)
    wanted = init(KEY, *(jnp.zeros(x.shape, x.dtype) for x in inputs))["params"]
    same(fresh_params(module, KEY, *inputs), wanted, 0.0 if alone else 4.0)


@pytest.mark.parametrize("name", ["decoder", "unet"])
def test_nothing_of_the_forward_pass_is_compiled(name):
    module, inputs = MODULES[name]
    text = jax.jit(lambda key: fresh_params(module, key, *inputs)).lower(KEY).as_text()
    assert "stablehlo.dot_general" not in text
    assert "stablehlo.convolution" not in text
    assert "stablehlo.reduce" not in text


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], x.shape[-1]))
        return jnp.tanh(x @ kernel + self.param("bias", nn.initializers.zeros, x.shape[-1:])), None


class Stacks(nn.Module):
    """Stacks of equal layers, one after the other, and layers on their own."""

    number: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.number):
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name=f"stack_{i}")(x)
            x, _ = Layer(name=f"layer_{i}")(x)
        return x


def test_equal_blocks_share_their_programs():
    [x] = float32((1, 13))
    fresh_params(Stacks(1), KEY, x)
    with compiling() as programs:
        made = fresh_params(Stacks(5), KEY, x)
    assert not programs
    same(made, Stacks(5).init(KEY, jnp.zeros((1, 13)))["params"])
    kernels = [tree["kernel"] for tree in made.values()]
    assert len({float(kernel.reshape(-1)[0]) for kernel in kernels}) == 10


class Chained(nn.Module):
    """A layer's parameter starts as what the input of the layer says, which no layer can know by itself."""

    @nn.compact
    def __call__(self, x):
        width = self.param("width", lambda key: jnp.mean(x, 0) + jax.random.normal(key, x.shape[1:]))
        return x + width, None


def test_parameters_made_of_what_comes_before_them_are_computed_with_it():
    stack = nn.scan(Chained, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    [x] = float32((2, 4))
    wanted = stack.init(KEY, jnp.zeros((2, 4)))["params"]
    assert np.abs(np.asarray(wanted["width"][1])).max() > 0
    same(fresh_params(stack, KEY, x), wanted)


def test_a_kernel_is_drawn_where_it_will_lie():
    """Under jit with placements, as who makes a large model on a mesh asks for it."""
    module, inputs = MODULES["decoder"]
    init = lambda key: fresh_params(module, key, *inputs)  # noqa: E731
    mesh = jax.make_mesh((1,), ("fsdp",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    made = jax.jit(init, out_shardings=whole)(KEY)
    assert {leaf.sharding for leaf in jax.tree.leaves(made)} == {whole}
    same(made, init(KEY))
