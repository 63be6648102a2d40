"""Configurations of diffusers' SD3Transformer2DModel, the denoiser of Stable Diffusion 3 and 3.5, in and out."""

from types import NoneType
from typing import Any

from sysdpo_jax.models.mmdit import MMDiTConfig
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.fields import build, express, listed, whole, whole_or_none
from sysdpo_jax.pretrained.names import Naming

CLASS = "SD3Transformer2DModel"
# fmt: off
NUMBERS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
)
# fmt: on


def read(config: ConfigReader) -> MMDiTConfig:
    """The configuration that a config.json states. Raises `CheckpointError`."""
    config.expect("_class_name", CLASS)
    default = MMDiTConfig()
    values: dict[str, Any] = {name: whole(config, name, getattr(default, name)) for name in NUMBERS}
    # A null stands for as many as go in, as in diffusers.
    channels = whole_or_none(config, "out_channels", default.out_channels)
    values["out_channels"] = values["in_channels"] if channels is None else channels
    # Files of Stable Diffusion 3 are older than these two.
    values["dual_attention_layers"] = listed(config, "dual_attention_layers", (), int)
    config.expect_kind((str, NoneType), "qk_norm")
    values["qk_norm"] = config.take("qk_norm", None)
    return build(config, MMDiTConfig, values)


def write(config: MMDiTConfig) -> dict[str, Any]:
    """config.json as diffusers writes it."""
    return {"_class_name": CLASS, **express(config)}


def naming(config: MMDiTConfig) -> Naming:
    return Naming(rename=((r"\.linear\.(\d)\.", r".linear_\1."),))
