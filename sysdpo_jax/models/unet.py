"""The text-conditioned U-Net of latent diffusion (arXiv 2112.10752), as diffusers' UNet2DConditionModel.

Images are [batch, height, width, channels], where diffusers has the channels first.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.layers import EmbeddingMLP
from sysdpo_jax.models.partitioning import constrain
from sysdpo_jax.models.unet_blocks import (
    DownBlock,
    MidBlock,
    UpBlock,
    conv,
    group_norm,
    timestep_embedding,
)
from sysdpo_jax.models.unet_config import DOWN_BLOCKS, UP_BLOCKS, UNetConfig

__all__ = ["UNet2DCondition", "UNetConfig"]


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
        x = constrain(conv(c, c.block_out_channels[0], "conv_in")(sample), "batch", "height", "width", "residual")
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
        x = constrain(conv(c, c.out_channels, "conv_out")(x), "batch", "height", "width", None)
        return x.astype(jnp.float32)

    def _time(self, timesteps: Array, text_embeds: Array | None, time_ids: Array | None) -> Array:
        c = self.config

        def wave(values: Array, width: int) -> Array:
            return timestep_embedding(values.astype(jnp.float32), width, c.flip_sin_to_cos, c.freq_shift)

        def embedding(name: str) -> EmbeddingMLP:
            return EmbeddingMLP(4 * c.block_out_channels[0], c.dtype, c.param_dtype, name=name)

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
