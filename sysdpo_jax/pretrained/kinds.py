"""The text-to-image pipelines of diffusers that are read and written: all that sets one apart from the others.

Whether its parts fit each other is seen from their configurations alone, before weights are read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdpo_jax.components import Diffusion, FlowMatching, SD3Text, SDXLText, TextEncoder
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.image_models import PROJECTED

# What the U-Net of SDXL is told of a picture: two numbers for each of its original size, its corner and its own size.
SIZES = 6


@dataclass(frozen=True)
class Kind:
    """A class of pipelines.

    name: of the class. component: what it is here. denoiser, encoders: the names of those parts.
    text: the conditioner, whose fields are called after the encoders. pooled: the encoders whose projections it joins.
    misfits: what of a kind, and of configurations and places by the names of its parts, does not fit its denoiser.
    defaults: what diffusers samples with when its caller says nothing.
    single: how the names of the tensors of a whole one in a single file begin.
    optional: an encoder and its tokenizer, which the pipeline can do without, and only together.
    stated: fields of the conditioner that model_index.json says, as (key, default).
    widths: fields of the conditioner that the denoiser's configuration says, as its fields.
    beside: what model_index.json says beside its parts.
    """

    name: str
    component: type[Diffusion] | type[FlowMatching]
    denoiser: str
    encoders: tuple[str, ...]
    text: type[Any]
    pooled: tuple[str, ...]
    misfits: "Callable[[Kind, Mapping[str, Any], Mapping[str, str]], Iterator[str]]"
    defaults: Mapping[str, Any]
    single: str
    optional: tuple[str, ...] = ()
    stated: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> list[str]:
        """The encoders that are always there, which are CLIP's."""
        return [name for name in self.encoders if name not in self.optional]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts that are read."""
        return (self.denoiser, "vae", "scheduler", *self.encoders, *map(tokenizer_name, self.encoders))


def tokenizer_name(encoder: str) -> str:
    """The name of the tokenizer that goes with a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def unet_misfits(kind: Kind, configs: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    """What a U-Net and its text encoders say differently."""
    unet, ours = configs["unet"], places["unet"]
    width, widths = _together("hidden_size", kind.clips, configs, places)
    if unet.cross_attention_dim != width:
        yield f"{ours} has cross_attention_dim={unet.cross_attention_dim}, but {widths} is {width}"
    wanted = "text_time" if kind.pooled else None
    if unet.addition_embed_type != wanted:
        yield f"{ours} has addition_embed_type={unet.addition_embed_type!r}, but that of a {kind.name} is {wanted!r}"
    elif kind.pooled:
        pooled, summaries = _together("projection_dim", kind.pooled, configs, places)
        stated, sizes = unet.projection_class_embeddings_input_dim, SIZES * unet.addition_time_embed_dim
        if stated != pooled + sizes:
            yield (
                f"{ours} has projection_class_embeddings_input_dim={stated}, but {summaries} is {pooled} and "
                f"{SIZES} times its addition_time_embed_dim {sizes}"
            )


def mmdit_misfits(kind: Kind, configs: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    """What the transformer of Stable Diffusion 3 and its text encoders say differently."""
    transformer, ours, t5 = configs["transformer"], places["transformer"], configs.get("text_encoder_3")
    stated, joint = transformer.pooled_projection_dim, transformer.joint_attention_dim
    pooled, summaries = _together("projection_dim", kind.pooled, configs, places)
    if stated != pooled:
        yield f"{ours} has pooled_projection_dim={stated}, but {summaries} is {pooled}"
    width, widths = _together("hidden_size", kind.clips, configs, places)
    if width > joint:
        yield f"{ours} has joint_attention_dim={joint}, but {widths} is {width}, which is more"
    if t5 is not None and t5.d_model != joint:
        yield f"{ours} has joint_attention_dim={joint}, but {places['text_encoder_3']} has d_model={t5.d_model}"


def _together(
    name: str, parts: Sequence[str], configs: Mapping[str, Any], places: Mapping[str, str]
) -> tuple[int, str]:
    """The sum of a field over the parts, and what it is a sum of."""
    words = f"{name} of {' and '.join(places[part] for part in parts)}{' together' if len(parts) > 1 else ''}"
    return sum(getattr(configs[part], name) for part in parts), words


SD = Kind(
    "StableDiffusionPipeline",
    Diffusion,
    "unet",
    ("text_encoder",),
    TextEncoder,
    pooled=(),
    misfits=unet_misfits,
    defaults={"num_steps": 50, "guidance_scale": 7.5},
    single="model.diffusion_model.",
    beside={"safety_checker": [None, None], "requires_safety_checker": False},
)
SDXL = Kind(
    "StableDiffusionXLPipeline",
    Diffusion,
    "unet",
    ("text_encoder", "text_encoder_2"),
    SDXLText,
    pooled=("text_encoder_2",),
    misfits=unet_misfits,
    defaults={"num_steps": 50, "guidance_scale": 5.0},
    single="conditioner.embedders.",
    stated={"zero_null": ("force_zeros_for_empty_prompt", True)},
)
SD3 = Kind(
    "StableDiffusion3Pipeline",
    FlowMatching,
    "transformer",
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
    SD3Text,
    pooled=("text_encoder", "text_encoder_2"),
    misfits=mmdit_misfits,
    defaults={"num_steps": 28, "guidance_scale": 7.0},
    single="model.diffusion_model.joint_blocks.",
    optional=("text_encoder_3", "tokenizer_3"),
    widths={"width_3": "joint_attention_dim"},
)
# A single file of a later one may have tensors that begin as those of an earlier one do.
KINDS = (SD, SDXL, SD3)


def check_fit(kind: Kind, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> None:
    """Raise `CheckpointError` that lists every misfit with both places and both numbers.

    configs: by the parts' names, ours. folders: where they were read.
    """
    places = {name: f"{folders[name] / 'config.json'}" for name in configs}
    found = [*_channels(configs[kind.denoiser], places[kind.denoiser], configs["vae"], places["vae"])]
    for name in kind.pooled:
        if not configs[name].with_projection:
            found.append(f"{places[name]} is of a CLIPTextModel, but a {kind.name} needs a {PROJECTED} there")
    found += kind.misfits(kind, configs, places)
    if found:
        raise CheckpointError(
            f"the parts of this {kind.name} do not fit each other: {'; '.join(found)}. Take the part that the model "
            "was made with, parts={'name': 'path/to/it'}"
        )


def _channels(denoiser: Any, place: str, vae: Any, vae_place: str) -> Iterator[str]:
    latent = vae.latent_channels
    theirs = f"{vae_place} has latent_channels={latent}"
    tasks = {2 * latent + 1: "inpainting", 2 * latent: "editing pictures (InstructPix2Pix)"}
    if denoiser.in_channels != latent:
        task = tasks.get(denoiser.in_channels)
        hint = f" (a model of that many is for {task}; only text to image is supported)" if task else ""
        yield f"{place} has in_channels={denoiser.in_channels}, but {theirs}{hint}"
    elif denoiser.out_channels != latent:
        yield f"{place} has out_channels={denoiser.out_channels}, but {theirs}"
    for name in ("in_channels", "out_channels"):
        colours = getattr(vae, name)
        if colours != 3:
            yield f"{vae_place} has {name}={colours}, but pictures have 3 (red, green, blue)"


def check_patches(transformer: Any, height: float, width: float, where: str) -> None:
    """Raise `CheckpointError` for pictures that a transformer's patches or its table of positions do not cover.

    height, width: of the latents. where: the transformer's configuration was read.
    """
    patch, most = transformer.patch_size, transformer.patch_size * transformer.pos_embed_max_size
    if any(side % patch or side > most for side in (height, width)):
        raise CheckpointError(
            f"pictures of this size have latents of {height:g} x {width:g}, but {where} has patch_size={patch}, which "
            f"must divide both, and pos_embed_max_size={transformer.pos_embed_max_size}, so that at most {most} fit: "
            "give another image_size=(height, width)"
        )
