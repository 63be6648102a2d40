"""Whether the parts of a pipeline fit each other, seen from their configurations alone, before weights are read."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.sources import SD, SD3, SDXL, denoiser_name

# transformers' model_max_length of a tokenizer whose files state none is 1e30.
UNSTATED = 10**20
# What the U-Net of SDXL is told of a picture: two numbers for each of its original size, its corner and its own size.
SIZES = 6


def check_fit(kind: str, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> None:
    """Raise `CheckpointError` that lists every misfit with both places and both numbers.

    configs: by the parts' names, ours. folders: where they were read.
    """
    places = {name: f"{folders[name] / 'config.json'}" for name in configs}
    found = [*_channels(kind, configs, places), *_texts(kind, configs, places)]
    if found:
        raise CheckpointError(
            f"the parts of this {kind} do not fit each other: {'; '.join(found)}. Take the part that the model was "
            "made with, parts={'name': 'path/to/it'}"
        )


def _channels(kind: str, configs: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    name = denoiser_name(kind)
    denoiser, latent = configs[name], configs["vae"].latent_channels
    theirs = f"{places['vae']} has latent_channels={latent}"
    tasks = {2 * latent + 1: "inpainting", 2 * latent: "editing pictures (InstructPix2Pix)"}
    if denoiser.in_channels != latent:
        task = tasks.get(denoiser.in_channels)
        hint = f" (a model of that many is for {task}; only text to image is supported)" if task else ""
        yield f"{places[name]} has in_channels={denoiser.in_channels}, but {theirs}{hint}"
    elif denoiser.out_channels != latent:
        yield f"{places[name]} has out_channels={denoiser.out_channels}, but {theirs}"
    for field in ("in_channels", "out_channels"):
        colours = getattr(configs["vae"], field)
        if colours != 3:
            yield f"{places['vae']} has {field}={colours}, but pictures have 3 (red, green, blue)"


def _texts(kind: str, configs: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    clips = [name for name in ("text_encoder", "text_encoder_2") if name in configs]
    width = sum(configs[name].hidden_size for name in clips)
    widths = f"hidden_size of {_sum(places, clips)}"
    denoiser, ours = configs[denoiser_name(kind)], places[denoiser_name(kind)]
    pooling = {SD: [], SDXL: clips[1:], SD3: clips}[kind]
    for name in pooling:
        if not configs[name].with_projection:
            yield f"{places[name]} is of a CLIPTextModel, but a {kind} needs a CLIPTextModelWithProjection there"
    pooled = sum(configs[name].projection_dim for name in pooling)
    summaries = f"projection_dim of {_sum(places, pooling)}"
    if kind == SD3:
        if denoiser.pooled_projection_dim != pooled:
            yield f"{ours} has pooled_projection_dim={denoiser.pooled_projection_dim}, but {summaries} is {pooled}"
        joint = denoiser.joint_attention_dim
        if width > joint:
            yield f"{ours} has joint_attention_dim={joint}, but {widths} is {width}, which is more"
        t5 = configs.get("text_encoder_3")
        if t5 is not None and t5.d_model != joint:
            yield f"{ours} has joint_attention_dim={joint}, but {places['text_encoder_3']} has d_model={t5.d_model}"
        return
    if denoiser.cross_attention_dim != width:
        yield f"{ours} has cross_attention_dim={denoiser.cross_attention_dim}, but {widths} is {width}"
    wanted = "text_time" if kind == SDXL else None
    if denoiser.addition_embed_type != wanted:
        yield f"{ours} has addition_embed_type={denoiser.addition_embed_type!r}, but that of a {kind} is {wanted!r}"
    elif kind == SDXL:
        sizes = SIZES * denoiser.addition_time_embed_dim
        stated = denoiser.projection_class_embeddings_input_dim
        if stated != pooled + sizes:
            yield (
                f"{ours} has projection_class_embeddings_input_dim={stated}, but {summaries} is {pooled} and "
                f"{SIZES} times its addition_time_embed_dim {sizes}"
            )


def _sum(places: Mapping[str, str], names: list[str]) -> str:
    return " and ".join(places[name] for name in names) + (" together" if len(names) > 1 else "")


def caption_length(clips: Iterable[tuple[Path, Any, Any]]) -> int:
    """The tokens that captions are padded to for CLIP, as its tokenizers state, by default all that it has room for.

    clips: folder of the tokenizer, tokenizer and its text encoder's configuration. Raises `CheckpointError` where an
    encoder has no room for them, and where they are not the same number for all.
    """
    lengths = {}
    for folder, tokenizer, encoder in clips:
        stated, positions = tokenizer.model_max_length, encoder.max_position_embeddings
        if positions < stated < UNSTATED:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json has model_max_length={stated}, but its text encoder has "
                f"max_position_embeddings={positions}: take the tokenizer of that encoder, or lower model_max_length"
            )
        lengths[folder] = int(min(stated, positions))
    if len(set(lengths.values())) > 1:
        listed = " but ".join(f"{folder} of {length}" for folder, length in lengths.items())
        raise CheckpointError(
            f"the tokenizers of a pipeline have one model_max_length: that of {listed}: set them to the same number"
        )
    return next(iter(lengths.values()))


def check_vocabulary(tokenizer: Any, vocabulary: int, where: str) -> None:
    """Raise `CheckpointError` where the tokenizer is of another model, one with more tokens.

    Added tokens beyond the vocabulary are let through: some checkpoints have such tokens and never use them (one for
    images in Gemma 3, a padding token), and a text in which one occurs is refused by its row.
    """
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= vocabulary}
    ordinary = sorted(beyond.keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()})
    if ordinary:
        raise CheckpointError(
            f"the tokenizer in {where} has {len(ordinary)} tokens beyond the model's vocab_size={vocabulary}, such as "
            f"{ordinary[0]!r}: it is another model's; fetch the one that belongs to these weights"
        )


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
