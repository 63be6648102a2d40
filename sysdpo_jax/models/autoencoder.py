"""The image autoencoder of latent diffusion (arXiv 2112.10752), as diffusers' AutoencoderKL, with its parameter names.

Images are [batch, height, width, channels] with values in [-1, 1], where diffusers has the channels first.
Axes: B batch, h w image, C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.models.layers import Conv, Dense
from sysdpo_jax.models.unet import Image, Resampler, ResnetBlock2D, group_norm, nearest

# Where diffusers cuts the logarithm of the variance.
LOGVAR_RANGE = (-30.0, 20.0)


class PositionAttention(nn.Module):
    """Self-attention between an image's positions, one head, after a norm and around a residual.

    Parameters: group_norm, to_q, to_k, to_v, to_out_0.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c, (batch, _, _, channels) = self.config, x.shape
        h = group_norm(c, "group_norm")(x).reshape(batch, -1, channels)
        queries, keys, values = (Dense(c, channels, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        return x + Dense(c, channels, name="to_out_0")(attend(queries, keys, values)[:, :, 0]).reshape(x.shape)


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


class Level(nn.Module):
    """DownEncoderBlock2D or UpDecoderBlock2D: residual blocks, then half or twice the image, if asked."""

    config: AutoencoderConfig
    channels: int
    blocks: int
    resize: str | None

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w out"]:
        for i in range(self.blocks):
            x = ResnetBlock2D(self.config, self.channels, name=f"resnets_{i}")(x, None)
        if self.resize == "half":
            # Padded on the right and at the bottom alone, unlike the U-Net's.
            return Resampler(self.config, 2, (0, 1), name="downsamplers_0")(x)
        if self.resize == "twice":
            doubled = nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
            return Resampler(self.config, 1, name="upsamplers_0")(doubled)
        return x


class Encoder(nn.Module):
    """Pixels to the moments of the latents' distribution, side by side on the last axis."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w moments"]:
        c, levels = self.config, len(self.config.block_out_channels)
        x = Conv(c, c.block_out_channels[0], name="conv_in")(x)
        for i, channels in enumerate(c.block_out_channels):
            x = Level(c, channels, c.layers_per_block, "half" if i < levels - 1 else None, name=f"down_blocks_{i}")(x)
        x = nn.silu(group_norm(c, "conv_norm_out")(MidBlock(c, name="mid_block")(x)))
        return Conv(c, 2 * c.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels, float32."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch h w pixel_channels"]:
        c, levels = self.config, len(self.config.block_out_channels)
        x = MidBlock(c, name="mid_block")(Conv(c, c.block_out_channels[-1], name="conv_in")(x))
        for i, channels in enumerate(reversed(c.block_out_channels)):
            x = Level(c, channels, c.layers_per_block + 1, "twice" if i < levels - 1 else None, name=f"up_blocks_{i}")(
                x
            )
        x = nn.silu(group_norm(c, "conv_norm_out")(x))
        return Conv(c, c.out_channels, name="conv_out")(x).astype(jnp.float32)


class AutoencoderKL(nn.Module):
    """Images to Gaussian latents and latents to images. Latents are raw: scaling them is the caller's part."""

    config: AutoencoderConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.use_quant_conv:
            self.quant_conv = Conv(c, 2 * c.latent_channels, 1)
        if c.use_post_quant_conv:
            self.post_quant_conv = Conv(c, c.latent_channels, 1)

    def encode(
        self, images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch h w latent"], Float[Array, "batch h w latent"]]:
        """Mean and log-variance of the latents, float32; the latter is clipped to LOGVAR_RANGE."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "batch h w latent"]) -> Float[Array, "batch height width channels"]:
        """Pixels, float32, not clipped to [-1, 1]."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width out_channels"]:
        """The images decoded from their mean latents: what `init` runs to make every parameter."""
        return self.decode(self.encode(images)[0])


def scale_latents(config: AutoencoderConfig, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(latents - shift_factor) * scaling_factor: the latents a denoiser works on."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: AutoencoderConfig, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The inverse of `scale_latents`."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)
