"""The shape of an image autoencoder, under the field names of diffusers' AutoencoderKL."""

from dataclasses import dataclass

from sysdpo_jax.models.config import Precision


@dataclass(frozen=True)
class AutoencoderConfig(Precision):
    """Defaults are those of diffusers. The activation is SiLU, the blocks DownEncoderBlock2D and UpDecoderBlock2D.

    block_out_channels: of each level, from the image inwards; each level but the last halves the image.
    scaling_factor, shift_factor: of the latents that a denoiser works on, see `scale_latents`.
    sample_size, force_upcast: kept for the checkpoint, for pipelines in PyTorch; nothing here depends on them.
    Raises ValueError for groups that do not divide the channels.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int | tuple[int, int] = 32
    force_upcast: bool = True

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"AutoencoderConfig: norm_num_groups={self.norm_num_groups} must divide {channels} channels"
                )

    @property
    def norm_eps(self) -> float:
        """Of every norm; diffusers has no setting for it."""
        return 1e-6
