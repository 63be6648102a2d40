"""Text-to-image pipelines of diffusers as Diffusion and FlowMatching components, and back.

The denoiser is what is trained; the autoencoder and, unless asked otherwise, the text encoders are frozen entries of
the parameters. A safety checker looks at finished pictures only: it is neither loaded nor written.
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.components import Diffusion, FlowMatching, FrozenText, LatentCodec, SD3Text, SDXLText, TextEncoder
from sysdpo_jax.components.source import Source
from sysdpo_jax.components.text import CaptionTruncation, TextConditioner
from sysdpo_jax.diffusion.samplers import FlowEuler
from sysdpo_jax.models.mmdit import MMDiT
from sysdpo_jax.models.unet import UNet2DCondition
from sysdpo_jax.pretrained import schedulers
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, check_settings, read_json
from sysdpo_jax.pretrained.fields import flag
from sysdpo_jax.pretrained.fit import caption_length, check_fit, check_patches
from sysdpo_jax.pretrained.handing_on import recalled, remember, write_files, write_like
from sysdpo_jax.pretrained.params import Shardings
from sysdpo_jax.pretrained.parts import (
    CLIP,
    MMDIT,
    T5,
    UNET,
    VAE,
    Part,
    Stored,
    has_variant,
    read_part,
    write_part,
)
from sysdpo_jax.pretrained.sources import (
    ENCODERS,
    SD,
    SD3,
    SDXL,
    checked_parts,
    denoiser_name,
    part_folders,
    part_names,
    tokenizer_name,
)
from sysdpo_jax.pretrained.tokenizer_files import FILES, write_tokenizer
from sysdpo_jax.typing import Params

# What diffusers samples with when its caller says nothing.
DEFAULTS = {
    SD: {"num_steps": 50, "guidance_scale": 7.5},
    SDXL: {"num_steps": 50, "guidance_scale": 5.0},
    SD3: {"num_steps": 28, "guidance_scale": 7.0},
}
SCHEDULER, EXTRACTOR = "scheduler/scheduler_config.json", "feature_extractor"
PARTS = {"unet": UNET, "transformer": MMDIT, "vae": VAE}
PARTS |= {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5}
Pipeline = Diffusion | FlowMatching


def load_pipeline(
    path: Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = None,
    shardings: Shardings | None = None,
    variant: str | None = None,
    parts: Any = None,
    train_text: bool = False,
    image_size: tuple[int, int] | tuple[tuple[int, int], ...] | None = None,
    truncation: CaptionTruncation = "error",
    **settings: Any,
) -> tuple[Pipeline, Params]:
    """The component of a pipeline's folder and its parameters, {"denoiser": .., "codec": .., "text": {..}}.

    parts: folders that take the place of the pipeline's own, by name, and None for what is left out, see `load`.
    image_size: (height, width) of the pictures, by default what the denoiser was made for, or several, see
    `LatentCodec.sizes`. truncation: of captions, see `TextEncoder`. settings: fields of the component; steps and
    guidance are by default those of diffusers' pipeline.
    """
    index = ConfigReader(read_json(path / "model_index.json"), str(path / "model_index.json"))
    kind = index.take("_class_name")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise CheckpointError(f"{index.where}: {kind} is not supported, only {', '.join(DEFAULTS)}")
    check_settings(FlowMatching if kind == SD3 else Diffusion, settings, {"denoiser", "text", "codec", "source"})
    zero_null = flag(index, "force_zeros_for_empty_prompt", True) if kind == SDXL else False
    # They look at or mark finished pictures.
    index.ignore("safety_checker", "feature_extractor", "requires_safety_checker", "add_watermarker")
    index.expect("image_encoder", [None, None])
    index.ignore(*part_names(kind))
    index.finish()
    folders = part_folders(path, kind, index, checked_parts(kind, parts or {}), variant)

    # Everything that is small first: that parts do not fit each other should not wait for weights to be read.
    stored = {name: read_part(folders[name], PARTS[name], variant) for name in folders if name in PARTS}
    check_fit(kind, {name: part.config for name, part in stored.items()}, folders)
    if variant and not any(has_variant(part.folder, part.part, variant) for part in stored.values()):
        raise CheckpointError(f"no part of {path} has weights of the variant {variant!r}: leave variant out")
    encoders = [name for name in ENCODERS[kind] if name in stored]
    tokenizers = {name: _tokenizer(folders[tokenizer_name(name)], stored[name].config) for name in encoders}
    clips = encoders[:2]
    length = caption_length((folders[tokenizer_name(name)], tokenizers[name], stored[name].config) for name in clips)
    scheduler = _scheduler(folders["scheduler"] / "scheduler_config.json", kind)
    denoising, autoencoding = stored[denoiser_name(kind)], stored["vae"]
    sizes = _sizes(kind, denoising, autoencoding, image_size)

    denoiser, weights = denoising.load(dtype, param_dtype, _below(shardings, "denoiser"), remat=remat)
    # The autoencoder runs once, outside the step, and loses detail in half precision.
    autoencoder, codec = autoencoding.load("float32", param_dtype, _below(shardings, "codec"))
    modules, text_params = {}, {}
    for name in encoders:
        modules[name], text_params[name] = stored[name].load(dtype, param_dtype, _below(shardings, "text", name))
    text = _text(kind, modules, tokenizers, length, truncation, zero_null, denoiser.config)
    common = {
        "source": _source(path, variant, folders),
        "denoiser": denoiser,
        "text": text if train_text else FrozenText(text),
        "codec": LatentCodec(autoencoder, sizes),
        **DEFAULTS[kind],
    }
    params = {"denoiser": weights, "codec": codec, "text": text_params}
    if isinstance(scheduler, FlowEuler):
        return FlowMatching(**common | {"sampler": scheduler} | settings), params
    planned = {
        "schedule": scheduler.schedule,
        "prediction_type": scheduler.prediction_type,
        "sampler": scheduler.sampler,
    }
    return Diffusion(**common | planned | settings), params


def save_pipeline(folder: Path, component: Pipeline, params: Params) -> None:
    """The folders of a pipeline as diffusers' save_pretrained lays them out, frozen parts included.

    Of the files that the component was read from all is kept that it does not contradict.
    Raises `CheckpointError` for a component without an autoencoder, or whose text side is none of diffusers'.
    """
    if not isinstance(component.codec, LatentCodec):
        raise CheckpointError(
            "only a component with a LatentCodec is a pipeline of diffusers; this one works on pixels"
        )
    text = component.text.text if isinstance(component.text, FrozenText) else component.text
    kind, source = _kind(component, text), component.source
    written: dict[str, Any] = {"_class_name": kind, "image_encoder": [None, None]}

    def write(name: str, module: Any, params: Params, ids: dict[str, int | None]) -> None:
        below = None if source is None else source.below(name)
        written[name] = write_part(folder / name, PARTS[name], module, params, below, ids)

    write(denoiser_name(kind), component.denoiser, params["denoiser"], {})
    write("vae", component.codec.autoencoder, params["codec"], {})
    read = recalled(source, "model_index.json")
    for key in ENCODERS[kind]:
        beside, suffix = tokenizer_name(key), key.removeprefix("text_encoder")
        encoder, tokenizer = getattr(text, f"encoder{suffix}"), getattr(text, f"tokenizer{suffix}")
        written[key] = written[beside] = [None, None]
        if encoder is not None:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write(key, encoder, params["text"][key], ids)
            (folder / beside).mkdir()
            below = None if source is None else source.below(beside)
            as_read = write_tokenizer(folder / beside, tokenizer, below)
            if as_read and source is not None and beside not in dict(source.moved):
                written[beside] = read[beside]
            elif (folder / beside / "tokenizer.json").exists():
                # What is written anew says so too; every version reads it from this file alone.
                written[beside] = ["transformers", "PreTrainedTokenizerFast"]
            else:
                written[beside] = ["transformers", type(tokenizer).__name__]
    scheduler = schedulers.write(
        component.sampler
        if isinstance(component, FlowMatching)
        else schedulers.DiffusionScheduler(component.schedule, component.prediction_type, component.sampler),
        recalled(source, SCHEDULER),
    )
    write_like(folder, SCHEDULER, scheduler, source)
    written["scheduler"] = ["diffusers", scheduler["_class_name"]]
    extractor = () if source is None else source.below(EXTRACTOR).files
    write_files(folder, tuple((f"{EXTRACTOR}/{file}", data) for file, data in extractor))
    if not extractor:
        written[EXTRACTOR] = [None, None]
    if kind == SD:
        written |= {"safety_checker": [None, None], "requires_safety_checker": False}
    if isinstance(text, SDXLText):
        written["force_zeros_for_empty_prompt"] = text.zero_null
    write_like(folder, "model_index.json", read | written, source)


def denoiser_part(component: Pipeline) -> tuple[str, Part]:
    """The denoiser's name in a pipeline, and its kind. Raises `CheckpointError` for another one."""
    denoiser = component.denoiser
    if isinstance(denoiser, UNet2DCondition):
        return "unet", UNET
    if isinstance(denoiser, MMDiT):
        return "transformer", MMDIT
    raise CheckpointError(f"a {type(denoiser).__name__} is no denoiser of diffusers: use a run's checkpoints")


def _source(path: Path, variant: str | None, folders: Mapping[str, Path]) -> Source:
    """The small files of a pipeline and of its parts, wherever these lie."""
    parts = (f"{name}/config.json" for name in folders if name in PARTS)
    tokenizers = (f"{name}/{pattern}" for name in folders if name.startswith("tokenizer") for pattern in FILES)
    moved = {name: folder for name, folder in folders.items() if folder != path / name}
    return remember(path, variant, ("model_index.json", SCHEDULER, f"{EXTRACTOR}/*.json", *parts, *tokenizers), moved)


def _kind(component: Pipeline, text: TextConditioner) -> str:
    if isinstance(component, FlowMatching) and isinstance(text, SD3Text):
        return SD3
    if isinstance(component, Diffusion) and isinstance(text, SDXLText):
        return SDXL
    if isinstance(component, Diffusion) and isinstance(text, TextEncoder):
        return SD
    raise CheckpointError(f"no pipeline of diffusers is a {type(component).__name__} with a {type(text).__name__}")


def _text(
    kind: str,
    encoders: dict[str, Any],
    tokenizers: dict[str, Any],
    length: int,
    truncation: CaptionTruncation,
    zero_null: bool,
    config: Any,
) -> TextConditioner:
    """The conditioner; config: the denoiser's."""
    first, tokenizer = encoders["text_encoder"], tokenizers["text_encoder"]
    if kind == SD:
        return TextEncoder(first, tokenizer, length, truncation)
    second, tokenizer_2 = encoders["text_encoder_2"], tokenizers["text_encoder_2"]
    if kind == SDXL:
        return SDXLText(first, second, tokenizer, tokenizer_2, length, truncation, zero_null)
    third, tokenizer_3 = encoders.get("text_encoder_3"), tokenizers.get("text_encoder_3")
    width = config.joint_attention_dim
    return SD3Text(first, second, third, tokenizer, tokenizer_2, tokenizer_3, width, length, truncation=truncation)


def _scheduler(file: Path, kind: str) -> schedulers.DiffusionScheduler | FlowEuler:
    scheduler = schedulers.read(ConfigReader(read_json(file), str(file)))
    if isinstance(scheduler, FlowEuler) != (kind == SD3):
        raise CheckpointError(
            f"{file}: a {type(scheduler).__name__} does not go with a {kind}: take that pipeline's own scheduler"
        )
    return scheduler


def _sizes(kind: str, denoiser: Stored, autoencoder: Stored, wanted: Any) -> tuple[tuple[int, int], ...]:
    """Heights and widths of the pictures, by default the one that the denoiser was made for."""
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    height, width = np.broadcast_to(denoiser.config.sample_size or 64, 2).tolist()
    sizes = wanted or (factor * height, factor * width)
    sizes = sizes if isinstance(sizes[0], tuple) else (sizes,)
    if kind == SD3:
        for height, width in sizes:
            check_patches(denoiser.config, height / factor, width / factor, str(denoiser.folder / "config.json"))
    return tuple(sizes)


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a text encoder. encoder: its configuration."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer ({error}): fetch the whole pipeline") from None
    # Without its vocabulary a tokenizer loads all the same, with a few tokens; T5 has room for more than there are.
    if not 0.5 * encoder.vocab_size < len(tokenizer) <= encoder.vocab_size:
        raise CheckpointError(
            f"{folder} has {len(tokenizer)} tokens but its text encoder {encoder.vocab_size}: fetch the whole tokenizer"
        )
    return tokenizer


def _below(shardings: Shardings | None, *names: str) -> Shardings | None:
    """Shardings of one subtree, asked for under its own names so that rules on paths see them."""
    if shardings is None:
        return None

    def below(tree: Any) -> Any:
        placed = shardings(reduce(lambda inner, name: {name: inner}, reversed(names), tree))
        return reduce(lambda outer, name: outer[name], names, placed)

    return below
