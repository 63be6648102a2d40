"""The blocks of a text-conditioned U-Net, with the structure, semantics and parameter names of diffusers' blocks.

Members of diffusers' lists are named by their index: resnets_0, attentions_1, to_out_0; transformer_blocks are stacked.
Axes: B batch, h w image, C channels, L positions (h * w), S text tokens, D text width, T time embedding.
"""

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm, Projection
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed
from sysdpo_jax.models.unet_config import UNetConfig

Image = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch length channels"]
Text = Float[Array, "batch text text_width"]
TimeEmbedding = Float[Array, "batch time_width"]


@runtime_checkable
class BlockConfig(Protocol):
    """What a residual block needs to know; the autoencoder's configuration has it as well as the U-Net's."""

    @property
    def norm_num_groups(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def param_dtype(self) -> str: ...


def dense(c: BlockConfig, features: int, name: str, use_bias: bool = True) -> Dense:
    return Dense(features, use_bias, c.dtype, c.param_dtype, name=name)


def conv(
    c: BlockConfig,
    features: int,
    name: str | None,
    size: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
) -> Conv:
    return Conv(features, size, stride, c.dtype, c.param_dtype, padding, name=name)


def group_norm(c: BlockConfig, name: str, eps: float | None = None) -> GroupNorm:
    return GroupNorm(c.norm_num_groups, c.norm_eps if eps is None else eps, c.dtype, c.param_dtype, name=name)


class ResnetBlock2D(nn.Module):
    """Two convolutions around the time embedding, and a residual (arXiv 1512.03385), 1x1 where widths differ.

    time: None in an autoencoder, whose blocks have no such embedding.
    """

    config: BlockConfig
    channels: int

    @nn.compact
    def __call__(self, x: Image, time: TimeEmbedding | None) -> Float[Array, "batch height width out"]:
        c = self.config
        h = conv(c, self.channels, "conv1")(nn.silu(group_norm(c, "norm1")(x)))
        if time is not None:
            h = h + dense(c, self.channels, "time_emb_proj")(nn.silu(time))[:, None, None, :]
        h = constrain(h, "batch", "height", "width", "channels")
        h = conv(c, self.channels, "conv2")(nn.silu(group_norm(c, "norm2")(h)))
        if x.shape[-1] != self.channels:
            x = conv(c, self.channels, "conv_shortcut", size=1)(x)
        return _image(x + h)


class Attention(nn.Module):
    """Multi-head attention from x to `context` (to x itself when they are the same), arXiv 1706.03762."""

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, context: Text | Tokens) -> Tokens:
        c, width = self.config, x.shape[-1]

        def heads(name: str, y: Array) -> Array:
            made = dense(c, width, name, use_bias=False)(y).reshape(*y.shape[:2], self.heads, -1)
            return constrain(made, "batch", "length", "heads", None)

        queries, keys, values = heads("to_q", x), heads("to_k", context), heads("to_v", context)
        mixed = attend(queries, keys, values, implementation=c.attention)
        mixed = constrain(mixed, "batch", "length", "heads", None)
        return dense(c, width, "to_out_0")(mixed.reshape(x.shape))


class FeedForward(nn.Module):
    """Linear, GEGLU (arXiv 2002.05202), linear. Parameters: net_0/proj, net_2."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c, width = self.config, x.shape[-1]
        h, gate = jnp.split(Projection(8 * width, c.dtype, c.param_dtype, name="net_0")(x), 2, axis=-1)
        hidden = constrain(h * nn.gelu(gate, approximate=False), "batch", "length", "mlp")
        return dense(c, width, "net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each after a LayerNorm and around a residual.

    The body of the scan over a transformer's blocks, which wants a pair: the second part is empty.
    """

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, text: Text) -> tuple[Tokens, None]:
        c = self.config
        norms = [LayerNorm(1e-5, c.dtype, c.param_dtype, name=f"norm{i}") for i in (1, 2, 3)]
        normed = norms[0](x)
        x = residual(x + Attention(c, self.heads, name="attn1")(normed, normed))
        x = residual(x + Attention(c, self.heads, name="attn2")(norms[1](x), text))
        return residual(x + FeedForward(c, name="ff")(norms[2](x))), None


class Transformer2DModel(nn.Module):
    """An image as a sequence of positions through `depth` blocks, around a residual.

    The blocks' parameters are stacked on a leading axis: what is compiled is one block, however many there are.
    """

    config: UNetConfig
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x: Image, text: Text) -> Image:
        c, channels = self.config, x.shape[-1]
        block = recomputed(BasicTransformerBlock, c.remat, prevent_cse=self.depth == 1)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        h = group_norm(c, "norm", eps=1e-6)(x).reshape(x.shape[0], -1, channels)
        h = residual(dense(c, channels, "proj_in")(h))
        h, _ = blocks(c, self.heads, name="transformer_blocks")(h, text)
        return _image(x + dense(c, channels, "proj_out")(h).reshape(x.shape))


class Resampler(nn.Module):
    """The convolution after an upsampling or, with stride 2, instead of a downsampling. Parameter: conv.

    padding: as for `layers.Conv`.
    """

    config: BlockConfig
    stride: int
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w channels"]:
        return _image(conv(self.config, x.shape[-1], "conv", stride=self.stride, padding=self.padding)(x))


class DownBlock(nn.Module):
    """DownBlock2D or, with `heads`, CrossAttnDownBlock2D: returns the output and the images kept for the way up.

    depth: blocks in each of its transformers.
    """

    config: UNetConfig
    channels: int
    heads: int | None
    depth: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Image, time: TimeEmbedding, text: Text) -> tuple[Array, tuple[Array, ...]]:
        c, kept = self.config, []
        resnet = recomputed(ResnetBlock2D, c.remat)
        for i in range(c.layers_per_block):
            x = resnet(c, self.channels, name=f"resnets_{i}")(x, time)
            if self.heads:
                x = Transformer2DModel(c, self.heads, self.depth, name=f"attentions_{i}")(x, text)
            kept.append(x)
        if self.downsample:
            x = Resampler(c, 2, name="downsamplers_0")(x)
            kept.append(x)
        return x, tuple(kept)


class MidBlock(nn.Module):
    """UNetMidBlock2DCrossAttn: residual block, transformer, residual block."""

    config: UNetConfig
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x: Image, time: TimeEmbedding, text: Text) -> Image:
        c, channels = self.config, x.shape[-1]
        resnet = recomputed(ResnetBlock2D, c.remat)
        x = resnet(c, channels, name="resnets_0")(x, time)
        x = Transformer2DModel(c, self.heads, self.depth, name="attentions_0")(x, text)
        return resnet(c, channels, name="resnets_1")(x, time)


class UpBlock(nn.Module):
    """UpBlock2D or, with `heads`, CrossAttnUpBlock2D. kept: the images of the way down, read from the last.

    depth: blocks in each of its transformers.
    size: (height, width) to upsample to, that of the next block's images, which may be odd; None for the last block.
    """

    config: UNetConfig
    channels: int
    heads: int | None
    depth: int

    @nn.compact
    def __call__(
        self, x: Image, kept: tuple[Array, ...], time: TimeEmbedding, text: Text, size: tuple[int, int] | None
    ) -> Float[Array, "batch h w out"]:
        c = self.config
        resnet = recomputed(ResnetBlock2D, c.remat)
        for i, skip in enumerate(reversed(kept)):
            x = resnet(c, self.channels, name=f"resnets_{i}")(jnp.concatenate([x, skip], axis=-1), time)
            if self.heads:
                x = Transformer2DModel(c, self.heads, self.depth, name=f"attentions_{i}")(x, text)
        if size is None:
            return x
        return Resampler(c, 1, name="upsamplers_0")(nearest(x, size))


def _image(x: Array) -> Array:
    return constrain(x, "batch", "height", "width", "residual")


def nearest(x: Image, size: tuple[int, int]) -> Float[Array, "batch h w channels"]:
    """Repeat pixels up to `size`: output i shows input floor(i * in / out)."""
    rows, columns = ((jnp.arange(new) * old) // new for new, old in zip(size, x.shape[1:3], strict=True))
    return jnp.take(jnp.take(x, rows, axis=1), columns, axis=2)


def timestep_embedding(
    time: Float[Array, "batch"], width: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "batch width"]:
    """sin and cos of time * 10000^(-i / (width / 2 - freq_shift)); cos first if flipped. Float32."""
    half = width // 2
    angles = time[:, None] * jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - freq_shift))
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jax.lax.concatenate(parts, dimension=1)
