"""The text-conditioned U-Net of latent diffusion (arXiv 2112.10752), as diffusers' UNet2DConditionModel.

Images are [batch, height, width, channels], where diffusers has the channels first. Parameters have diffusers' names;
members of its lists are named by their index: resnets_0, attentions_1, to_out_0; transformer_blocks are stacked.
Axes: B batch, h w image, C channels, L positions (h * w), S text tokens, D text width, T time embedding.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.models.config import BlockOptions
from sysdpo_jax.models.layers import (
    Conv,
    Dense,
    EmbeddingMLP,
    GroupNorm,
    LayerNorm,
    Projection,
    gelu,
    join_heads,
    split_heads,
    timestep_embedding,
)
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed

Image = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch length channels"]
Text = Float[Array, "batch text text_width"]
TimeEmbedding = Float[Array, "batch time_width"]
ADDED_EMBEDDINGS = (None, "text_time")
# block type -> whether it has cross-attention
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig(BlockOptions):
    """Defaults are those of diffusers. The middle block is always UNetMidBlock2DCrossAttn, the activation SiLU.

    attention_head_dim: NUMBER of heads, one for all blocks or one for each (diffusers keeps the misleading name).
    transformer_layers_per_block: one depth for all blocks or one for each; the middle block has the last one's.
    addition_embed_type: "text_time" adds the embedding of a pooled text and of sizes (SDXL, arXiv 2307.01952) to that
    of the time; it needs addition_time_embed_dim, the width of one size's embedding, and
    projection_class_embeddings_input_dim, that of all of them and the pooled text together.
    use_linear_projection: only says how a checkpoint stores proj_in and proj_out; the mathematics is the same.
    sample_size, upcast_attention: kept for the checkpoint, for pipelines in PyTorch; nothing here depends on them.
    Raises ValueError for a block type or an added embedding it does not know, lists of different lengths or heads that
    do not divide.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    use_linear_projection: bool = False
    sample_size: int | tuple[int, int] | None = None
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            unknown = [kind for kind in types if kind not in known]
            if unknown:
                raise ValueError(f"UNetConfig: unknown {name} {unknown[0]!r}: choose among {', '.join(known)}")
            if len(types) != len(self.block_out_channels):
                raise ValueError(
                    f"UNetConfig: {len(types)} {name} but {len(self.block_out_channels)} block_out_channels"
                )
        for name, values in (("attention_head_dim", self.heads), ("transformer_layers_per_block", self.depths)):
            if len(values) != len(self.block_out_channels):
                raise ValueError(f"UNetConfig: {len(values)} {name} for {len(self.block_out_channels)} blocks")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                raise ValueError(
                    f"UNetConfig: {heads} heads and {self.norm_num_groups} groups must divide {channels} channels"
                )

        if self.addition_embed_type not in ADDED_EMBEDDINGS:
            raise ValueError(
                f"UNetConfig: unknown addition_embed_type {self.addition_embed_type!r}: 'text_time' or None"
            )
        widths = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type and None in widths:
            raise ValueError(
                f"UNetConfig: addition_embed_type {self.addition_embed_type!r} needs addition_time_embed_dim and "
                f"projection_class_embeddings_input_dim, which are {widths[0]} and {widths[1]}"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each block."""
        return self._each(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks in each transformer of each block."""
        return self._each(self.transformer_layers_per_block)

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value


# What convolutions and residual blocks need to know.
ImageConfig = UNetConfig | AutoencoderConfig


def group_norm(c: ImageConfig, name: str, eps: float | None = None) -> GroupNorm:
    return GroupNorm(c, c.norm_num_groups, c.norm_eps if eps is None else eps, name=name)


class ResnetBlock2D(nn.Module):
    """Two convolutions around the time embedding, and a residual (arXiv 1512.03385), 1x1 where widths differ.

    time: None in an autoencoder, whose blocks have no such embedding.
    """

    config: ImageConfig
    channels: int

    @nn.compact
    def __call__(self, x: Image, time: TimeEmbedding | None) -> Float[Array, "batch height width out"]:
        c = self.config
        h = Conv(c, self.channels, name="conv1")(nn.silu(group_norm(c, "norm1")(x)))
        if time is not None:
            h = h + Dense(c, self.channels, name="time_emb_proj")(nn.silu(time))[:, None, None, :]
        h = constrain(h, "batch", "height", "width", "channels")
        h = Conv(c, self.channels, name="conv2")(nn.silu(group_norm(c, "norm2")(h)))
        if x.shape[-1] != self.channels:
            x = Conv(c, self.channels, 1, name="conv_shortcut")(x)
        return _image(x + h)


class Attention(nn.Module):
    """Multi-head attention from x to `context` (to x itself when they are the same), arXiv 1706.03762."""

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, context: Text | Tokens) -> Tokens:
        c, width = self.config, x.shape[-1]

        def heads(name: str, y: Array) -> Array:
            return split_heads(Dense(c, width, False, name=name)(y), self.heads)

        queries, keys, values = heads("to_q", x), heads("to_k", context), heads("to_v", context)
        mixed = join_heads(attend(queries, keys, values, implementation=c.attention))
        return Dense(c, width, name="to_out_0")(mixed)


class FeedForward(nn.Module):
    """Linear, GEGLU (arXiv 2002.05202), linear. Parameters: net_0/proj, net_2."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c, width = self.config, x.shape[-1]
        h, gate = jnp.split(Projection(c, 8 * width, name="net_0")(x), 2, axis=-1)
        hidden = constrain(h * gelu(gate), "batch", "length", "mlp")
        return Dense(c, width, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each after a LayerNorm and around a residual.

    The body of the scan over a transformer's blocks, which wants a pair: the second part is empty.
    """

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, text: Text) -> tuple[Tokens, None]:
        c = self.config
        norms = [LayerNorm(c, name=f"norm{i}") for i in (1, 2, 3)]
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
        block = recomputed(BasicTransformerBlock, c.remat, c.dtype, prevent_cse=self.depth == 1)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        h = group_norm(c, "norm", eps=1e-6)(x).reshape(x.shape[0], -1, channels)
        h = residual(Dense(c, channels, name="proj_in")(h))
        h, _ = blocks(c, self.heads, name="transformer_blocks")(h, text)
        return _image(x + Dense(c, channels, name="proj_out")(h).reshape(x.shape))


class Resampler(nn.Module):
    """The convolution after an upsampling or, with stride 2, instead of a downsampling. Parameter: conv.

    padding: as for `layers.Conv`.
    """

    config: ImageConfig
    stride: int
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w channels"]:
        return _image(Conv(self.config, x.shape[-1], 3, self.stride, self.padding, name="conv")(x))


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
        resnet = recomputed(ResnetBlock2D, c.remat, c.dtype)
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
        resnet = recomputed(ResnetBlock2D, c.remat, c.dtype)
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
        resnet = recomputed(ResnetBlock2D, c.remat, c.dtype)
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


class UNet2DCondition(nn.Module):
    """Predicts noise, velocity or image from a noisy image, its time and the encoded text.

    With addition_embed_type "text_time" (SDXL) also from a pooled text and from sizes.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "batch height width channels"],
        timesteps: Float[Array, "batch"] | Int[Array, "batch"],
        encoder_hidden_states: Float[Array, "batch text text_width"],
        text_embeds: Float[Array, "batch pooled"] | None = None,
        time_ids: Float[Array, "batch ids"] | Int[Array, "batch ids"] | None = None,
    ) -> Float[Array, "batch height width out_channels"]:
        """Any height and width; the output is float32.

        text_embeds, time_ids: of SDXL, where time_ids are (original height, width, crop top, left, target height,
        width). Raises ValueError where the configuration's added embedding and these two do not go together.
        """
        c = self.config
        text = encoder_hidden_states.astype(c.dtype)
        time = self._time(timesteps, text_embeds, time_ids)
        x = constrain(Conv(c, c.block_out_channels[0], name="conv_in")(sample), "batch", "height", "width", "residual")
        levels = len(c.block_out_channels)
        skips = [x]
        for i, kind in enumerate(c.down_block_types):
            heads = c.heads[i] if DOWN_BLOCKS[kind] else None
            down = DownBlock(c, c.block_out_channels[i], heads, c.depths[i], i < levels - 1, name=f"down_blocks_{i}")
            x, kept = down(x, time, text)
            skips += kept
        x = MidBlock(c, c.heads[-1], c.depths[-1], name="mid_block")(x, time, text)
        for i, kind in enumerate(c.up_block_types):
            level = levels - 1 - i
            heads = c.heads[level] if UP_BLOCKS[kind] else None
            kept, skips = tuple(skips[-c.layers_per_block - 1 :]), skips[: -c.layers_per_block - 1]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            up = UpBlock(c, c.block_out_channels[level], heads, c.depths[level], name=f"up_blocks_{i}")
            x = up(x, kept, time, text, size)
        x = nn.silu(group_norm(c, "conv_norm_out")(x))
        x = constrain(Conv(c, c.out_channels, name="conv_out")(x), "batch", "height", "width", None)
        return x.astype(jnp.float32)

    def _time(self, timesteps: Array, text_embeds: Array | None, time_ids: Array | None) -> Array:
        c = self.config

        def wave(values: Array, width: int) -> Array:
            return timestep_embedding(values.astype(jnp.float32), width, c.flip_sin_to_cos, c.freq_shift)

        def embedding(name: str) -> EmbeddingMLP:
            return EmbeddingMLP(c, 4 * c.block_out_channels[0], name=name)

        time = embedding("time_embedding")(wave(timesteps, c.block_out_channels[0]).astype(c.dtype))
        if c.addition_embed_type is None:
            if text_embeds is not None or time_ids is not None:
                raise ValueError("UNet2DCondition: text_embeds and time_ids need addition_embed_type='text_time'")
            return time
        if text_embeds is None or time_ids is None or c.addition_time_embed_dim is None:
            raise ValueError("UNet2DCondition: addition_embed_type='text_time' needs both text_embeds and time_ids")
        sizes = wave(time_ids.reshape(-1), c.addition_time_embed_dim).reshape(time_ids.shape[0], -1)
        added = jnp.concatenate([text_embeds.astype(jnp.float32), sizes], axis=-1)
        if added.shape[-1] != c.projection_class_embeddings_input_dim:
            raise ValueError(
                f"UNet2DCondition: text_embeds of width {text_embeds.shape[-1]} and {time_ids.shape[1]} time_ids of "
                f"{c.addition_time_embed_dim} make {added.shape[-1]}, but projection_class_embeddings_input_dim="
                f"{c.projection_class_embeddings_input_dim}"
            )
        return time + embedding("add_embedding")(added.astype(c.dtype))
