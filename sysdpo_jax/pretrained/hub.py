"""Where a checkpoint lies: a local folder or file, or a repository of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sysdpo_jax.pretrained.base import CheckpointError, read_json

# Configurations and tokenizers: everything small. Weights are asked for by name; pickles and other formats never.
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


def locate(path_or_hub_id: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """A local path as it is; else the repository of that name, of which only safetensors weights are downloaded.

    revision: branch, tag or commit of the repository. variant: of the weights' names, as in "model.fp16.safetensors".
    Raises `CheckpointError` when there is neither.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        return path
    repository = str(path_or_hub_id)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=SMALL))
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*SMALL, *_weights(folder, variant)])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repository!r} is no local path, and the hub does not give it as a repository ({error}): check the name "
            "and the revision, log in for gated models, or download it and pass the folder"
        ) from None


def _weights(folder: Path, variant: str | None) -> list[str]:
    """Patterns of the weight files that `load` will read from the repository."""
    middle = f".{variant}" if variant else ""
    stems = ["model"]
    if (folder / "model_index.json").exists():
        parts = [name for name, value in read_json(folder / "model_index.json").items() if isinstance(value, list)]
        stems = [f"{part}/{stem}" for part in parts for stem in ("model", "diffusion_pytorch_model")]
    return [
        f"{stem}{end}" for stem in stems for end in (f"{middle}.safetensors", f"{middle}-?????-of-?????.safetensors")
    ]
