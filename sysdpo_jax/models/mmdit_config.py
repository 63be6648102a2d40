"""The shape of an MMDiT under the field names of diffusers' SD3Transformer2DModel, and its table of positions.

Axes of the table: N patches of the largest square sample, row by row, D width.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# How a patch's row or column becomes the position that is encoded.
POSITION_GRIDS = ("stretched", "centred")


@dataclass(frozen=True)
class MMDiTConfig:
    """Defaults are those of diffusers: a small Stable Diffusion 3 (arXiv 2403.03206).

    sample_size: height of the latents in training; only the positions depend on it. pos_embed_max_size: in patches.
    dual_attention_layers: blocks with a second attention among the patches, as in Stable Diffusion 3.5 medium.
    qk_norm: None or "rms_norm", of the queries and keys of each head.
    position_grid: how the released table, which diffusers keeps in the checkpoint, was made. "stretched": i * s / max,
    what diffusers makes for a new model; "centred": (i - (max - s) / 2) * 16 / s, where s is sample_size in patches, so
    that the centre of the table spans [0, 16): what the paper describes (section 5.3.2).
    remat: recompute each block's activations in the backward pass.
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
    position_grid: str = "stretched"
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
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
        if self.position_grid not in POSITION_GRIDS:
            raise ValueError(
                f"MMDiTConfig: unknown position_grid {self.position_grid!r}: choose among {', '.join(POSITION_GRIDS)}"
            )
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise ValueError(f"MMDiTConfig: dual_attention_layers has {beyond[0]}, but there are {self.num_layers}")

    @property
    def width(self) -> int:
        """Of the patches and of the text inside the model."""
        return self.num_attention_heads * self.attention_head_dim


def position_waves(c: MMDiTConfig) -> Float[np.ndarray, "rows half"]:
    """Sines, then cosines, of each row's position * 10000^(-4k / width) for k < width / 4; columns have the same.

    Positions are rounded to float32, angles computed in float64, as diffusers does.
    """
    index = np.arange(c.pos_embed_max_size, dtype=np.float32)
    trained = c.sample_size // c.patch_size
    if c.position_grid == "stretched":
        positions = index / np.float32(c.pos_embed_max_size / trained)
    else:
        positions = (index - np.float32((c.pos_embed_max_size - trained) / 2)) * np.float32(16 / trained)
    quarter = c.width // 4
    angles = np.outer(positions.astype(np.float64), 1.0 / 10000 ** (np.arange(quarter) / quarter))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def position_table(c: MMDiTConfig) -> Float[np.ndarray, "1 patches width"]:
    """The encoded column, then the encoded row, of each patch: the buffer pos_embed.pos_embed of a checkpoint."""
    waves = position_waves(c)
    size = c.pos_embed_max_size
    return np.concatenate([np.tile(waves, (size, 1)), np.repeat(waves, size, axis=0)], axis=1)[None]
