"""The shape of a U-Net, under the field names of diffusers' UNet2DConditionModel."""

from dataclasses import dataclass

from sysdpo_jax.models.attention import check_attention
from sysdpo_jax.models.remat import check_remat

# block type -> whether it has cross-attention
ADDED_EMBEDDINGS = (None, "text_time")
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig:
    """Defaults are those of diffusers. The middle block is always UNetMidBlock2DCrossAttn, the activation SiLU.

    attention_head_dim: NUMBER of heads, one for all blocks or one for each (diffusers keeps the misleading name).
    transformer_layers_per_block: one depth for all blocks or one for each; the middle block has the last one's.
    addition_embed_type: "text_time" adds the embedding of a pooled text and of sizes (SDXL, arXiv 2307.01952) to that
    of the time; it needs addition_time_embed_dim, the width of one size's embedding, and
    projection_class_embeddings_input_dim, that of all of them and the pooled text together.
    use_linear_projection: only says how a checkpoint stores proj_in and proj_out; the mathematics is the same.
    sample_size, upcast_attention: kept for the checkpoint, for pipelines in PyTorch; nothing here depends on them.
    remat: what of each residual and transformer block is recomputed in the backward pass, see `remat.recomputed`.
    attention: how attention is computed, see `attention.choose`.
    dtype: precision of the products; norms, softmax and the output are float32 in any case.
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
    remat: str | None = None
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_remat(self.remat, "UNetConfig")
        check_attention(self.attention, "UNetConfig")
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
