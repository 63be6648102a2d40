"""Where a checkpoint lies: a local folder or file, or a repository of the Hugging Face hub."""

import re
from collections.abc import Collection
from pathlib import Path

from sysdpo_jax.pretrained.base import CheckpointError, read_json

# Configurations and tokenizers: everything small. Weights are asked for by name; pickles and other formats never.
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
# The folders of a pipeline that hold weights we read; a safety checker is none of them.
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.startswith("."):
        raise CheckpointError(
            f"there is no folder or file {repository!r}, and it is no name of a repository on the hub"
        )
    try:
        folder = _download(repository, revision, [])
        stems = _stems(folder, part, without)
        _download(repository, revision, _weights(stems, variant))
        lacking = [stem for stem in stems if not list(folder.glob(f"{stem}*.safetensors"))]
        if variant and lacking:
            _download(repository, revision, _weights(lacking, None))
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


def _download(repository: str, revision: str | None, weights: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=[*SMALL, *weights]))


def _stems(folder: Path, part: str | None, without: Collection[str]) -> list[str]:
    """What the names of the weight files that `load` reads begin with."""
    if not (folder / "model_index.json").exists():
        name = part or "text"
        return [_stem(name)] if part is None or part in PARTS else []
    names = [name for name in read_json(folder / "model_index.json") if name in PARTS and name not in without]
    return [f"{name}/{_stem(name)}" for name in names if part in (None, name)]


def _stem(part: str) -> str:
    return "model" if part.startswith("text") else "diffusion_pytorch_model"


def _weights(stems: list[str], variant: str | None) -> list[str]:
    middle = f".{variant}" if variant else ""
    # Both places where versions of the libraries put the variant in a shard's name.
    ends = {f"{middle}.safetensors", f"{middle}-*-of-*.safetensors", f"-*-of-*{middle}.safetensors"}
    return sorted(stem + end for stem in stems for end in ends)
