"""Where each part of a pipeline lies: in the pipeline's folder, or where `parts` says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.hub import locate

# Of the models, in the order in which a pipeline runs them; each text encoder has a tokenizer.
SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
ENCODERS = {
    SD: ("text_encoder",),
    SDXL: ("text_encoder", "text_encoder_2"),
    SD3: ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
# What a pipeline can do without, and only together.
OPTIONAL = ("text_encoder_3", "tokenizer_3")
# A folder or a repository for each part that takes the place of the pipeline's own; None leaves the part out.
Parts = Mapping[str, str | Path | None]


def denoiser_name(kind: str) -> str:
    return "transformer" if kind == SD3 else "unet"


def tokenizer_name(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def part_names(kind: str) -> tuple[str, ...]:
    """The names of all parts that are read of a pipeline of that class."""
    texts = ENCODERS[kind]
    return (denoiser_name(kind), "vae", "scheduler", *texts, *map(tokenizer_name, texts))


def checked_parts(kind: str, parts: Any) -> Parts:
    """`parts` as it was given.

    Raises `CheckpointError` for what is no mapping to folders, and for names that a pipeline of that class does not
    have or cannot do without.
    """
    names = part_names(kind)
    if not isinstance(parts, Mapping):
        raise CheckpointError(f"parts={parts!r} is no mapping from the names of parts to folders or None")
    unknown = [name for name in parts if name not in names]
    if unknown:
        raise CheckpointError(f"parts: a {kind} has no {unknown[0]!r}, only {', '.join(names)}")
    droppable = [name for name in OPTIONAL if name in names]
    needed = [name for name, given in parts.items() if given is None and name not in droppable]
    if needed:
        only = f"only {' with '.join(droppable)} can be left out" if droppable else "nothing of it can be left out"
        raise CheckpointError(f"parts: a {kind} cannot do without {needed[0]}; {only}: give a folder instead of None")
    pair = {name: parts[name] for name in droppable if name in parts}
    if None in pair.values() and (pair.get(OPTIONAL[0], "its own") is not None or pair.get(OPTIONAL[1]) is not None):
        raise CheckpointError(
            f"parts: {' and '.join(OPTIONAL)} are left out together: give None for {OPTIONAL[0]} and no folder for "
            f"{OPTIONAL[1]}"
        )
    for name, given in parts.items():
        if not isinstance(given, str | Path | None):
            raise CheckpointError(f"parts: {name} is {given!r}: give the path of a folder, a repository's name or None")
    return parts


def part_folders(path: Path, kind: str, index: ConfigReader, parts: Parts, variant: str | None) -> dict[str, Path]:
    """The folder of each part that the pipeline in `path` has; index: its model_index.json.

    Raises `CheckpointError` for a part that is nowhere.
    """
    dropped = OPTIONAL if any(name in OPTIONAL and parts[name] is None for name in parts) else ()
    folders: dict[str, Path] = {}
    for name in part_names(kind):
        listed = index.take(name, None)
        given = parts.get(name)
        if name in dropped:
            continue
        if given is not None:
            folders[name] = _given(name, given, variant)
        elif isinstance(listed, list) and listed[-1:] != [None]:
            folders[name] = path / name
        elif name not in OPTIONAL:
            raise CheckpointError(f"{index.where} has no {name}: {_remedy(name)}")
    absent = [name for name, folder in folders.items() if not folder.is_dir()]
    if absent:
        raise CheckpointError(
            f"there is no folder {folders[absent[0]]}, which {index.where} lists: {_remedy(absent[0])}"
        )
    lacking = [name for name in OPTIONAL if name not in folders]
    if len(lacking) == 1 and OPTIONAL[0] in part_names(kind):
        raise CheckpointError(
            f"{index.where} has no {lacking[0]}: {_remedy(lacking[0])}, or leave out both of the pair"
        )
    return folders


def _given(name: str, given: str | Path, variant: str | None) -> Path:
    folder = locate(given, variant=variant, part=name)
    if not folder.is_dir():
        raise CheckpointError(f"parts: {name} is the file {folder}: give the folder that holds the part's config.json")
    # A whole pipeline stands for its part of that name.
    inside = folder / name
    return inside if not (folder / "config.json").exists() and inside.is_dir() else folder


def _remedy(name: str) -> str:
    return f"fetch the whole pipeline, or give that part from elsewhere, parts={{{name!r}: 'path/to/{name}'}}"
