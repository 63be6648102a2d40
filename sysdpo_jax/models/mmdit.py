"""The multimodal diffusion transformer of Stable Diffusion 3 (arXiv 2403.03206), as diffusers' SD3Transformer2DModel.

Images are [batch, height, width, channels], where diffusers has the channels first.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.mmdit_blocks import JointBlock, Modulation, PatchEmbed, TimeAndText, dense, modulate
from sysdpo_jax.models.mmdit_config import MMDiTConfig, position_table, position_waves
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed

__all__ = ["MMDiT", "MMDiTConfig", "position_table", "position_waves"]


class MMDiT(nn.Module):
    """Predicts the velocity of a noisy latent from its time, the encoded text and the pooled text."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "batch height width channels"],
        timesteps: Float[Array, "batch"] | Int[Array, "batch"],
        encoder_hidden_states: Float[Array, "batch text text_width"],
        pooled_projections: Float[Array, "batch pooled_width"],
    ) -> Float[Array, "batch height width out_channels"]:
        """timesteps in [0, 1000]. The output is float32.

        Raises ValueError for a height or width that is no multiple of patch_size or exceeds pos_embed_max_size patches.
        """
        c = self.config
        height, width = sample.shape[1:3]
        for side in (height, width):
            if side % c.patch_size or side > c.patch_size * c.pos_embed_max_size:
                raise ValueError(
                    f"MMDiT: latents of {height} x {width}: both must be multiples of patch_size={c.patch_size} and "
                    f"at most {c.patch_size * c.pos_embed_max_size} (pos_embed_max_size={c.pos_embed_max_size} patches)"
                )
        block_type = recomputed(JointBlock, c.remat)
        x = PatchEmbed(c, name="pos_embed")(sample)
        condition = TimeAndText(c, name="time_text_embed")(timesteps.astype(jnp.float32), pooled_projections)
        text: Array | None = residual(dense(c, c.width, "context_embedder")(encoder_hidden_states))
        for i in range(c.num_layers):
            block = block_type(c, i in c.dual_attention_layers, i == c.num_layers - 1, name=f"transformer_blocks_{i}")
            x, text = block(x, text, condition)
        scale, shift = Modulation(c, 2, name="norm_out")(condition)
        x = dense(c, c.patch_size**2 * c.out_channels, "proj_out")(modulate(x, scale, shift))
        rows, columns = height // c.patch_size, width // c.patch_size
        x = x.reshape(-1, rows, columns, c.patch_size, c.patch_size, c.out_channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, height, width, c.out_channels).astype(jnp.float32)
        return constrain(x, "batch", "height", "width", None)
