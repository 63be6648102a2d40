"""The image autoencoder of latent diffusion (arXiv 2112.10752), as diffusers' AutoencoderKL.

Images are [batch, height, width, channels] with values in [-1, 1], where diffusers has the channels first.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.autoencoder_blocks import Decoder, Encoder
from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.models.unet_blocks import conv

__all__ = ["AutoencoderConfig", "AutoencoderKL", "scale_latents", "unscale_latents"]

# Where diffusers cuts the logarithm of the variance.
LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(nn.Module):
    """Images to Gaussian latents and latents to images. Latents are raw: scaling them is the caller's part."""

    config: AutoencoderConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.use_quant_conv:
            self.quant_conv = conv(c, 2 * c.latent_channels, None, size=1)
        if c.use_post_quant_conv:
            self.post_quant_conv = conv(c, c.latent_channels, None, size=1)

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
