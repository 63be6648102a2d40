"""diffusers' AutoencoderKL."""

from typing import Any

from sysdpo_jax.models.autoencoder_config import AutoencoderConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import build, express, flag, listed, number, number_or_none, size, whole
from sysdpo_jax.pretrained.names import Naming

CLASS = "AutoencoderKL"
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# The attention's names in the first versions of diffusers.
ALIASES = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)


def read(config: ConfigReader) -> AutoencoderConfig:
    """Raises `CheckpointError` for an autoencoder that the module here cannot be."""
    config.expect("_class_name", CLASS)
    config.expect("act_fn", "silu", "swish")
    config.expect("latents_mean", None)
    config.expect("latents_std", None)
    default = AutoencoderConfig()
    channels = listed(config, "block_out_channels", default.block_out_channels, int)
    for name, kind in BLOCKS.items():
        blocks = list(listed(config, name, [kind], str))
        if blocks != [kind] * len(channels):
            raise CheckpointError(
                f"{config.where}: {name}={blocks!r} is not supported, only {kind!r} for each of the "
                f"{len(channels)} block_out_channels"
            )
    numbers = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
    flags = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast")
    values = {
        "block_out_channels": channels,
        **{name: whole(config, name, getattr(default, name)) for name in numbers},
        **{name: flag(config, name, True) for name in flags},
        "scaling_factor": number(config, "scaling_factor", default.scaling_factor),
        "shift_factor": number_or_none(config, "shift_factor"),
        "sample_size": size(config, default.sample_size) or default.sample_size,
    }
    return build(config, AutoencoderConfig, values)


def write(config: AutoencoderConfig) -> dict[str, Any]:
    """config.json as diffusers writes it; whatever is left out has diffusers' default."""
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in BLOCKS.items()}
    return {"_class_name": CLASS, **blocks, **express(config)}


def naming(config: AutoencoderConfig) -> Naming:
    return Naming(aliases=ALIASES)
