"""The encoder and decoder of an image autoencoder, with the parameter names of diffusers' blocks.

Axes: B batch, h w image, C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.models.unet_blocks import Image, Resampler, ResnetBlock2D, conv, dense, group_norm, nearest


class PositionAttention(nn.Module):
    """Self-attention between an image's positions, one head, after a norm and around a residual.

    Parameters: group_norm, to_q, to_k, to_v, to_out_0.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c, (batch, _, _, channels) = self.config, x.shape
        h = group_norm(c, "group_norm")(x).reshape(batch, -1, channels)
        queries, keys, values = (dense(c, channels, name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        return x + dense(c, channels, "to_out_0")(attend(queries, keys, values)[:, :, 0]).reshape(x.shape)


class MidBlock(nn.Module):
    """UNetMidBlock2D: residual block, attention where the configuration has it, residual block."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c, channels = self.config, x.shape[-1]
        x = ResnetBlock2D(c, channels, name="resnets_0")(x, None)
        if c.mid_block_add_attention:
            x = PositionAttention(c, name="attentions_0")(x)
        return ResnetBlock2D(c, channels, name="resnets_1")(x, None)


class EncoderBlock(nn.Module):
    """DownEncoderBlock2D: residual blocks, then half the image unless it is the last."""

    config: AutoencoderConfig
    channels: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w out"]:
        for i in range(self.config.layers_per_block):
            x = ResnetBlock2D(self.config, self.channels, name=f"resnets_{i}")(x, None)
        # Padded on the right and at the bottom alone, unlike the U-Net's.
        return Resampler(self.config, 2, (0, 1), name="downsamplers_0")(x) if self.downsample else x


class DecoderBlock(nn.Module):
    """UpDecoderBlock2D: one more residual block than the encoder's, then twice the image unless it is the last."""

    config: AutoencoderConfig
    channels: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w out"]:
        for i in range(self.config.layers_per_block + 1):
            x = ResnetBlock2D(self.config, self.channels, name=f"resnets_{i}")(x, None)
        if not self.upsample:
            return x
        doubled = nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
        return Resampler(self.config, 1, name="upsamplers_0")(doubled)


class Encoder(nn.Module):
    """Pixels to the moments of the latents' distribution, side by side on the last axis."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w moments"]:
        c, levels = self.config, len(self.config.block_out_channels)
        x = conv(c, c.block_out_channels[0], "conv_in")(x)
        for i, channels in enumerate(c.block_out_channels):
            x = EncoderBlock(c, channels, i < levels - 1, name=f"down_blocks_{i}")(x)
        x = nn.silu(group_norm(c, "conv_norm_out")(MidBlock(c, name="mid_block")(x)))
        return conv(c, 2 * c.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels, float32."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w pixel_channels"]:
        c, levels = self.config, len(self.config.block_out_channels)
        x = MidBlock(c, name="mid_block")(conv(c, c.block_out_channels[-1], "conv_in")(x))
        for i, channels in enumerate(reversed(c.block_out_channels)):
            x = DecoderBlock(c, channels, i < levels - 1, name=f"up_blocks_{i}")(x)
        x = nn.silu(group_norm(c, "conv_norm_out")(x))
        return conv(c, c.out_channels, "conv_out")(x).astype(jnp.float32)
