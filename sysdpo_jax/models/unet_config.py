"""The shape of a U-Net, under the field names of diffusers' UNet2DConditionModel."""

from dataclasses import dataclass

# block type -> whether it has cross-attention
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig:
    """Defaults are those of diffusers. The middle block is always UNetMidBlock2DCrossAttn, the activation SiLU.

    attention_head_dim: NUMBER of heads, one for all blocks or one for each (diffusers keeps the misleading name).
    use_linear_projection: only says how a checkpoint stores proj_in and proj_out; the mathematics is the same.
    remat: recompute each block's activations in the backward pass.
    dtype: precision of the products; norms, softmax and the output are float32 in any case.
    Raises ValueError for a block type it does not know, lists of different lengths or heads that do not divide.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    use_linear_projection: bool = False
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            unknown = [kind for kind in types if kind not in known]
            if unknown:
                raise ValueError(f"UNetConfig: unknown {name} {unknown[0]!r}: choose among {', '.join(known)}")
            if len(types) != len(self.block_out_channels):
                raise ValueError(
                    f"UNetConfig: {len(types)} {name} but {len(self.block_out_channels)} block_out_channels"
                )
        if len(self.heads) != len(self.block_out_channels):
            raise ValueError(
                f"UNetConfig: {len(self.heads)} attention_head_dim for {len(self.block_out_channels)} blocks"
            )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                raise ValueError(
                    f"UNetConfig: {heads} heads and {self.norm_num_groups} groups must divide {channels} channels"
                )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each block."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return self.attention_head_dim
