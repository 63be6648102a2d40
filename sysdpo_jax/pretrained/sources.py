"""Where a checkpoint and each part of a pipeline lie: in local folders, or in repositories of the Hugging Face hub."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, read_json
from sysdpo_jax.pretrained.image_models import PARTS
from sysdpo_jax.pretrained.kinds import Kind

# Configurations and tokenizers: everything small. Weights are asked for by name; pickles and other formats never.
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
# A folder or a repository for each part that takes the place of the pipeline's own; None leaves the part out.
Parts = Mapping[str, str | Path | None]


def locate(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    part: str | None = None,
    without: Collection[str] = (),
) -> Path:
    """A local path as it is; else the repository of that name, of which only what is read is downloaded.

    revision: branch, tag or commit of the repository. variant: of the weights' names, as in "model.fp16.safetensors";
    a part of a pipeline that has no such file is read from its plain one, as diffusers does.
    part: the only part of a pipeline that is wanted; the repository is that part or a pipeline that has it.
    without: parts of the pipeline that are not wanted.
    Raises `CheckpointError` when there is neither, or when the repository has no safetensors.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = str(path_or_hub_id)

    def download(weights: list[str]) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*SMALL, *weights]))

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.startswith("."):
        raise CheckpointError(
            f"there is no folder or file {repository!r}, and it is no name of a repository on the hub"
        )
    try:
        folder = download([])
        stems = _stems(folder, part, without)
        download(_weights(stems, variant))
        lacking = [stem for stem in stems if not list(folder.glob(f"{stem}*.safetensors"))]
        if variant and lacking:
            download(_weights(lacking, None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repository!r} is no local path, and the hub does not give it as a repository "
            f"({' '.join(str(error).split())[:120]}): check the name and the revision, log in for gated models, or "
            "download it and pass the folder or the GGUF file"
        ) from None
    if stems and not any(list(folder.glob(f"{stem}*.safetensors")) for stem in stems):
        raise CheckpointError(
            f"{repository!r} has no safetensors weights under the names that transformers and diffusers give them: "
            "where they are called as in model.fp16.safetensors pass variant='fp16'; download a GGUF file or a single "
            "file yourself and pass its path; pickle files are never read, load them with the library that wrote them "
            "and save them with save_pretrained(safe_serialization=True)"
        )
    return folder


def _stems(folder: Path, part: str | None, without: Collection[str]) -> list[str]:
    """What the names of the weight files that `load` reads begin with."""
    if not (folder / "model_index.json").exists():
        return ["model"] if part is None else [PARTS[part].stem] if part in PARTS else []
    names = [name for name in read_json(folder / "model_index.json") if name in PARTS and name not in without]
    return [f"{name}/{PARTS[name].stem}" for name in names if part in (None, name)]


def _weights(stems: list[str], variant: str | None) -> list[str]:
    middle = f".{variant}" if variant else ""
    # Both places where versions of the libraries put the variant in a shard's name.
    ends = {f"{middle}.safetensors", f"{middle}-*-of-*.safetensors", f"-*-of-*{middle}.safetensors"}
    return sorted(stem + end for stem in stems for end in ends)


def checked_parts(kind: Kind, parts: Any) -> Parts:
    """`parts` as it was given.

    Raises `CheckpointError` for what is no mapping to folders, and for names that a pipeline of that class does not
    have or cannot do without.
    """
    if not isinstance(parts, Mapping):
        raise CheckpointError(f"parts={parts!r} is no mapping from the names of parts to folders or None")
    unknown = [name for name in parts if name not in kind.parts]
    if unknown:
        raise CheckpointError(f"parts: a {kind.name} has no {unknown[0]!r}, only {', '.join(kind.parts)}")
    needed = [name for name, given in parts.items() if given is None and name not in kind.optional]
    if needed:
        left = f"only {' with '.join(kind.optional)}" if kind.optional else "nothing of it"
        raise CheckpointError(
            f"parts: a {kind.name} cannot do without {needed[0]}; {left} can be left out: give a folder instead of None"
        )
    pair = [parts[name] for name in kind.optional if name in parts]
    if None in pair and (kind.optional[0] not in parts or any(given is not None for given in pair)):
        raise CheckpointError(
            f"parts: {' and '.join(kind.optional)} are left out together: give None for {kind.optional[0]} and no "
            f"folder for {kind.optional[1]}"
        )
    for name, given in parts.items():
        if not isinstance(given, str | Path | None):
            raise CheckpointError(f"parts: {name} is {given!r}: give the path of a folder, a repository's name or None")
    return parts


def part_folders(path: Path, kind: Kind, index: ConfigReader, parts: Parts, variant: str | None) -> dict[str, Path]:
    """The folder of each part that the pipeline in `path` has; index: its model_index.json.

    Raises `CheckpointError` for a part that is nowhere.
    """
    dropped = kind.optional if None in parts.values() else ()
    folders: dict[str, Path] = {}
    for name in kind.parts:
        listed = index.take(name, None)
        given = parts.get(name)
        if name in dropped:
            continue
        if given is not None:
            folders[name] = _given(name, given, variant)
        elif isinstance(listed, list) and listed[-1:] != [None]:
            folders[name] = path / name
        elif name not in kind.optional:
            raise CheckpointError(f"{index.where} has no {name}: {_remedy(name)}")
    absent = [name for name, folder in folders.items() if not folder.is_dir()]
    if absent:
        raise CheckpointError(
            f"there is no folder {folders[absent[0]]}, which {index.where} lists: {_remedy(absent[0])}"
        )
    lacking = [name for name in kind.optional if name not in folders]
    if len(lacking) == 1:
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
