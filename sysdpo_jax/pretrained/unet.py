"""diffusers' UNet2DConditionModel: Stable Diffusion 1, 2 and XL."""

from typing import Any

from sysdpo_jax.models.unet import ADDED_EMBEDDINGS, UNetConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import build, express, flag, listed, number, size, whole, whole_or_each, whole_or_none
from sysdpo_jax.pretrained.names import Naming

CLASS = "UNet2DConditionModel"
# The transformers' projections, which older models store as 1 x 1 convolutions.
POINTWISE = r"\.proj_(in|out)\.weight$"
# In time_embedding and add_embedding the number is part of the name, not a place in a list.
RENAME = ((r"_embedding\.linear\.(\d)\.", r"_embedding.linear_\1."),)
# What the module here is, in diffusers' words.
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": (CLASS,),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1.0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    # diffusers refuses it as well: the heads are in attention_head_dim.
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def read(config: ConfigReader) -> UNetConfig:
    """Raises `CheckpointError` for a U-Net that the module here cannot be."""
    for name, allowed in FIXED.items():
        config.expect(name, *allowed)
    config.expect("addition_embed_type", *ADDED_EMBEDDINGS)
    # Of an added embedding that is refused.
    config.ignore("addition_embed_type_num_heads")
    only_cross = config.take("only_cross_attention", False)
    if only_cross is True or (isinstance(only_cross, list) and any(only_cross)):
        raise CheckpointError(f"{config.where}: only_cross_attention={only_cross!r} is not supported, only False")
    default = UNetConfig()
    blocks = {
        name: listed(config, name, getattr(default, name), str) for name in ("down_block_types", "up_block_types")
    }
    shape = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
    sizes = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    values = {
        **blocks,
        **{name: whole(config, name, getattr(default, name)) for name in (*shape, "freq_shift")},
        "addition_embed_type": config.take("addition_embed_type", None),
        **{name: whole_or_none(config, name) for name in sizes},
        "block_out_channels": listed(config, "block_out_channels", default.block_out_channels, int),
        "transformer_layers_per_block": whole_or_each(config, "transformer_layers_per_block", 1),
        "attention_head_dim": whole_or_each(config, "attention_head_dim", default.attention_head_dim),
        "norm_eps": number(config, "norm_eps", default.norm_eps),
        "flip_sin_to_cos": flag(config, "flip_sin_to_cos", True),
        "use_linear_projection": flag(config, "use_linear_projection", False),
        "sample_size": size(config, None),
        # Null is what SDXL says.
        "upcast_attention": flag(config, "upcast_attention", False),
    }
    return build(config, UNetConfig, values)


def write(config: UNetConfig) -> dict[str, Any]:
    """config.json as diffusers writes it; whatever is left out has diffusers' default."""
    return {"_class_name": CLASS, **express(config)}


def naming(config: UNetConfig) -> Naming:
    pointwise = None if config.use_linear_projection else POINTWISE
    return Naming(rename=RENAME, stacked="transformer_blocks", pointwise=pointwise)
