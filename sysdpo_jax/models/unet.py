"""The text-conditioned U-Net of latent diffusion (arXiv 2112.10752), as diffusers' UNet2DConditionModel.

Images are [batch, height, width, channels], where diffusers has the channels first.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.unet_blocks import (
    DownBlock,
    MidBlock,
    UpBlock,
    conv,
    dense,
    group_norm,
    timestep_embedding,
)
from sysdpo_jax.models.unet_config import DOWN_BLOCKS, UP_BLOCKS, UNetConfig

__all__ = ["UNet2DCondition", "UNetConfig"]


class TimestepEmbedding(nn.Module):
    """linear_1, SiLU, linear_2."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch time_width"]:
        width = 4 * self.config.block_out_channels[0]
        return dense(self.config, width, "linear_2")(nn.silu(dense(self.config, width, "linear_1")(x)))


class UNet2DCondition(nn.Module):
    """Predicts noise, velocity or image from a noisy image, its time and the encoded text."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "batch height width channels"],
        timesteps: Float[Array, "batch"] | Int[Array, "batch"],
        encoder_hidden_states: Float[Array, "batch text text_width"],
    ) -> Float[Array, "batch height width out_channels"]:
        """Any height and width; the output is float32."""
        c = self.config
        wrap: Any = (lambda block: nn.remat(block)) if c.remat else (lambda block: block)
        up_wrap: Any = (lambda block: nn.remat(block, static_argnums=(5,))) if c.remat else (lambda block: block)
        text = encoder_hidden_states.astype(c.dtype)
        wave = timestep_embedding(
            timesteps.astype(jnp.float32), c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift
        )
        time = TimestepEmbedding(c, name="time_embedding")(wave.astype(c.dtype))
        x = conv(c, c.block_out_channels[0], "conv_in")(sample)
        levels = len(c.block_out_channels)
        skips = [x]
        for i, kind in enumerate(c.down_block_types):
            heads = c.heads[i] if DOWN_BLOCKS[kind] else None
            block = wrap(DownBlock)(c, c.block_out_channels[i], heads, i < levels - 1, name=f"down_blocks_{i}")
            x, kept = block(x, time, text)
            skips += kept
        x = wrap(MidBlock)(c, c.heads[-1], name="mid_block")(x, time, text)
        for i, kind in enumerate(c.up_block_types):
            level = levels - 1 - i
            heads = c.heads[level] if UP_BLOCKS[kind] else None
            kept, skips = tuple(skips[-c.layers_per_block - 1 :]), skips[: -c.layers_per_block - 1]
            size = skips[-1].shape[1:3] if skips else None
            block = up_wrap(UpBlock)(c, c.block_out_channels[level], heads, name=f"up_blocks_{i}")
            x = block(x, kept, time, text, size)
        x = nn.silu(group_norm(c, "conv_norm_out")(x))
        return conv(c, c.out_channels, "conv_out")(x).astype(jnp.float32)
