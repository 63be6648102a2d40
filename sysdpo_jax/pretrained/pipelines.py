"""Text-to-image pipelines of diffusers as Diffusion and FlowMatching components, and back.

The denoiser is what is trained; the autoencoder and, unless asked otherwise, the text encoders are frozen entries of
the parameters. A safety checker looks at finished pictures only: it is neither loaded nor written.
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.components import Diffusion, FlowMatching, FrozenText, LatentCodec
from sysdpo_jax.components.source import Source
from sysdpo_jax.components.text import CaptionTruncation
from sysdpo_jax.diffusion.samplers import FlowEuler
from sysdpo_jax.models.mmdit import MMDiTConfig
from sysdpo_jax.pretrained import schedulers
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, check_settings, read_json
from sysdpo_jax.pretrained.handing_on import NOWHERE, recalled, remember, write_files, write_like
from sysdpo_jax.pretrained.image_models import PARTS, Part, Stored, has_variant, read_part, write_part
from sysdpo_jax.pretrained.kinds import KINDS, Kind, check_fit, check_patches, tokenizer_name
from sysdpo_jax.pretrained.params import Shardings
from sysdpo_jax.pretrained.refusals import refuse_adapter
from sysdpo_jax.pretrained.sources import checked_parts, part_folders
from sysdpo_jax.pretrained.tokenizer_files import FILES, caption_length, read_tokenizer, write_tokenizer
from sysdpo_jax.typing import Params

SCHEDULER, EXTRACTOR = "scheduler/scheduler_config.json", "feature_extractor"
Pipeline = Diffusion | FlowMatching


def load_pipeline(
    path: Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = "auto",
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
    name = index.take("_class_name")
    kind = next((kind for kind in KINDS if kind.name == name), None)
    if kind is None:
        raise CheckpointError(f"{index.where}: {name} is not supported, only {', '.join(kind.name for kind in KINDS)}")
    check_settings(kind.component, settings, {"denoiser", "text", "codec", "source"})
    stated = {field: index.read(key, bool, default) for field, (key, default) in kind.stated.items()}
    # They look at or mark finished pictures.
    index.ignore("safety_checker", "feature_extractor", "requires_safety_checker", "add_watermarker")
    index.expect("image_encoder", [None, None])
    index.ignore(*kind.parts)
    index.finish()
    folders = part_folders(path, kind, index, checked_parts(kind, parts or {}), variant)

    # Everything that is small first: that parts do not fit each other should not wait for weights to be read.
    models = [name for name in folders if name in PARTS]
    for name in models:
        refuse_adapter(folders[name])
    stored = {name: read_part(folders[name], PARTS[name], variant) for name in models}
    check_fit(kind, {name: part.config for name, part in stored.items()}, folders)
    if variant and not any(has_variant(part.folder, part.part, variant) for part in stored.values()):
        raise CheckpointError(f"no part of {path} has weights of the variant {variant!r}: leave variant out")
    encoders = [name for name in kind.encoders if name in stored]
    tokenizers = {name: _tokenizer(folders[tokenizer_name(name)], stored[name].config) for name in encoders}
    length = caption_length(
        (folders[tokenizer_name(name)], tokenizers[name], stored[name].config) for name in kind.clips
    )
    scheduler = _scheduler(folders["scheduler"] / "scheduler_config.json", kind)
    denoising, autoencoding = stored[kind.denoiser], stored["vae"]
    sizes = _sizes(denoising, autoencoding, image_size)

    denoiser, weights = denoising.load(dtype, param_dtype, _below(shardings, "denoiser"), remat=remat)
    # The autoencoder runs once, outside the step, and loses detail in half precision.
    autoencoder, codec = autoencoding.load("float32", param_dtype, _below(shardings, "codec"))
    modules, text_params = {}, {}
    for name in encoders:
        modules[name], text_params[name] = stored[name].load(dtype, param_dtype, _below(shardings, "text", name))
    text = kind.text(
        **{name.replace("text_", ""): modules.get(name) for name in kind.encoders},
        **{tokenizer_name(name): tokenizers.get(name) for name in kind.encoders},
        **stated | {field: getattr(denoiser.config, theirs) for field, theirs in kind.widths.items()},
        length=length,
        truncation=truncation,
    )
    given = {
        "source": _source(path, variant, folders),
        "denoiser": denoiser,
        "text": text if train_text else FrozenText(text),
        "codec": LatentCodec(autoencoder, sizes),
        **kind.defaults,
        **({"sampler": scheduler} if isinstance(scheduler, FlowEuler) else vars(scheduler)),
        **settings,
    }
    return kind.component(**given), {"denoiser": weights, "codec": codec, "text": text_params}


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
    source = component.source or NOWHERE
    kind = next((k for k in KINDS if isinstance(component, k.component) and isinstance(text, k.text)), None)
    if kind is None:
        raise CheckpointError(f"no pipeline of diffusers is a {type(component).__name__} with a {type(text).__name__}")
    written: dict[str, Any] = {"_class_name": kind.name, "image_encoder": [None, None]}

    def write(name: str, module: Any, params: Params, ids: dict[str, int | None]) -> None:
        written[name] = write_part(folder / name, PARTS[name], module, params, source.below(name), ids)

    write(kind.denoiser, component.denoiser, params["denoiser"], {})
    write("vae", component.codec.autoencoder, params["codec"], {})
    read = recalled(source, "model_index.json")
    for key in kind.encoders:
        beside = tokenizer_name(key)
        encoder, tokenizer = getattr(text, key.replace("text_", "")), getattr(text, beside)
        written[key] = written[beside] = [None, None]
        if encoder is not None:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write(key, encoder, params["text"][key], ids)
            (folder / beside).mkdir()
            as_read = write_tokenizer(folder / beside, tokenizer, source.below(beside))
            if as_read and beside not in dict(source.moved):
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
    extractor = source.below(EXTRACTOR).files
    write_files(folder, tuple((f"{EXTRACTOR}/{file}", data) for file, data in extractor))
    if not extractor:
        written[EXTRACTOR] = [None, None]
    written |= {**kind.beside, **{key: getattr(text, field) for field, (key, _) in kind.stated.items()}}
    write_like(folder, "model_index.json", read | written, source)


def denoiser_part(component: Pipeline) -> tuple[str, Part]:
    """The denoiser's name in a pipeline, and its kind. Raises `CheckpointError` for another one."""
    for kind in KINDS:
        if isinstance(component.denoiser, PARTS[kind.denoiser].module):
            return kind.denoiser, PARTS[kind.denoiser]
    raise CheckpointError(f"a {type(component.denoiser).__name__} is no denoiser of diffusers: use a run's checkpoints")


def _source(path: Path, variant: str | None, folders: Mapping[str, Path]) -> Source:
    """The small files of a pipeline and of its parts, wherever these lie."""
    parts = (f"{name}/config.json" for name in folders if name in PARTS)
    tokenizers = (f"{name}/{pattern}" for name in folders if name.startswith("tokenizer") for pattern in FILES)
    moved = {name: folder for name, folder in folders.items() if folder != path / name}
    return remember(path, variant, ("model_index.json", SCHEDULER, f"{EXTRACTOR}/*.json", *parts, *tokenizers), moved)


def _scheduler(file: Path, kind: Kind) -> schedulers.DiffusionScheduler | FlowEuler:
    scheduler = schedulers.read(ConfigReader(read_json(file), str(file)))
    if isinstance(scheduler, FlowEuler) != (kind.component is FlowMatching):
        raise CheckpointError(
            f"{file}: a {type(scheduler).__name__} does not go with a {kind.name}: take that pipeline's own scheduler"
        )
    return scheduler


def _sizes(denoiser: Stored, autoencoder: Stored, wanted: Any) -> tuple[tuple[int, int], ...]:
    """Heights and widths of the pictures, by default the one that the denoiser was made for."""
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    height, width = np.broadcast_to(denoiser.config.sample_size or 64, 2).tolist()
    sizes = wanted or (factor * height, factor * width)
    sizes = sizes if isinstance(sizes[0], tuple) else (sizes,)
    if isinstance(denoiser.config, MMDiTConfig):
        for height, width in sizes:
            check_patches(denoiser.config, height / factor, width / factor, str(denoiser.folder / "config.json"))
    return tuple(sizes)


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a text encoder. encoder: its configuration."""
    tokenizer = read_tokenizer(folder)
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
