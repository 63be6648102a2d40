"""The shape of an MMDiT under the field names of diffusers' SD3Transformer2DModel, and a new model's positions.

Axes of the table: N patches of the largest square sample, row by row, D width.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sysdpo_jax.models.attention import check_attention
from sysdpo_jax.models.remat import check_remat


@dataclass(frozen=True)
class MMDiTConfig:
    """Defaults are those of diffusers: a small Stable Diffusion 3 (arXiv 2403.03206).

    sample_size: height of the latents in training; only a new model's positions depend on it.
    pos_embed_max_size: side of the table of positions, in patches.
    dual_attention_layers: blocks with a second attention among the patches, as in Stable Diffusion 3.5 medium.
    qk_norm: None or "rms_norm", of the queries and keys of each head.
    remat: what of each block is recomputed in the backward pass, see `remat.recomputed`.
    attention: how attention is computed, see `attention.choose`.
    dtype: precision of the products; norms, softmax and the output are float32 in any case.
    Raises ValueError for what cannot be built.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    remat: str | None = None
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_remat(self.remat, "MMDiTConfig")
        check_attention(self.attention, "MMDiTConfig")
        if self.patch_size not in (1, 2):
            raise ValueError(f"MMDiTConfig: patch_size must be 1 or 2, not {self.patch_size}")
        if self.width % 4:
            raise ValueError(
                f"MMDiTConfig: num_attention_heads * attention_head_dim = {self.width} must be a multiple of 4, the "
                "sines and cosines of rows and columns"
            )
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"MMDiTConfig: caption_projection_dim={self.caption_projection_dim} must be num_attention_heads * "
                f"attention_head_dim = {self.width}, for text and patches attend jointly"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"MMDiTConfig: unknown qk_norm {self.qk_norm!r}: None or 'rms_norm'")
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise ValueError(f"MMDiTConfig: dual_attention_layers has {beyond[0]}, but there are {self.num_layers}")

    @property
    def width(self) -> int:
        """Of the patches and of the text inside the model."""
        return self.num_attention_heads * self.attention_head_dim


def position_waves(c: MMDiTConfig) -> Float[np.ndarray, "rows half"]:
    """Sines, then cosines, of each row's position * 10000^(-4k / width) for k < width / 4; columns have the same.

    Row i of max is at i * s / max, where s is sample_size in patches. Positions are rounded to float32, angles computed
    in float64, as diffusers does.
    """
    trained = c.sample_size // c.patch_size
    positions = np.arange(c.pos_embed_max_size, dtype=np.float32) / np.float32(c.pos_embed_max_size / trained)
    quarter = c.width // 4
    angles = np.outer(positions.astype(np.float64), 1.0 / 10000 ** (np.arange(quarter) / quarter))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def position_table(c: MMDiTConfig) -> Float[Array, "1 patches width"]:
    """The encoded column, then the encoded row, of each patch, as a new model of diffusers has them.

    Up to a gigabyte, so only its waves are computed on the host: below a trace the table costs nothing.
    """
    waves, size = position_waves(c), c.pos_embed_max_size
    columns, rows = (jnp.broadcast_to(half, (size, size, c.width // 2)) for half in (waves[None], waves[:, None]))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size**2, c.width)
