"""What `load` may be given that is no checkpoint by itself, and the way from each to one that is."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from sysdpo_jax.pretrained.base import CheckpointError, read_json
from sysdpo_jax.pretrained.image_models import PARTS
from sysdpo_jax.pretrained.kinds import KINDS
from sysdpo_jax.pretrained.tensors import PICKLES

# An adapter changes the model it lies beside: transformers applies PEFT's when it loads the folder.
ADAPTERS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
# How the libraries that wrote them merge the two kinds of adapters into their model.
MERGE = (
    "peft.PeftModel.from_pretrained(model, folder_of_the_adapter).merge_and_unload().save_pretrained(new_folder), and "
    "tokenizer.save_pretrained(new_folder)"
)
FUSE = (
    "pipe.load_lora_weights(folder_of_the_adapter), pipe.fuse_lora(), pipe.unload_lora_weights(), "
    "pipe.save_pretrained(new_folder) in diffusers"
)
# Backwards, so that of the parts of one class the first is kept.
PART_CLASSES = {kind: name for name, part in reversed(PARTS.items()) for kind in part.classes}
# How the tensors of a whole Stable Diffusion in one file begin, the newest first, and diffusers' class that reads it.
SINGLE_FILES = tuple((kind.single, kind.name) for kind in reversed(KINDS))


def refuse_adapter(folder: Path) -> None:
    """Raise `CheckpointError` where an adapter lies in the folder, alone or beside a whole model."""
    files = [name for name in ADAPTERS if (folder / name).exists()]
    if not files:
        return
    merge = FUSE if files[0].startswith("pytorch_lora_weights") else MERGE
    if not any((folder / name).exists() for name in ("config.json", "model_index.json")):
        stated = read_json(folder / files[0]).get("base_model_name_or_path") if files[0].endswith("json") else None
        base = f" of {stated!r}" if stated else ""
        raise CheckpointError(
            f"{folder} holds an adapter{base}: load its base model instead, or merge the two: {merge}"
        )
    raise CheckpointError(
        f"{folder} holds an adapter beside the model ({', '.join(files)}), which would change what the model computes: "
        f"move it into a folder of its own to load the model without it, or merge the two: {merge}"
    )


def refuse_file(path: Path) -> None:
    """Raise `CheckpointError` for a file that does not stand alone."""
    if not path.is_file() or path.suffix == ".gguf":
        return
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(
            f"{path} is a pickle file, which can run code and is never read: convert one that you trust with the "
            "library that wrote it, from_pretrained or diffusers' from_single_file, and save_pretrained(new_folder)"
        )
    hint = _single_file(path) if path.suffix == ".safetensors" else None
    raise CheckpointError(hint or f"{path} is a file: pass the folder that holds it (only .gguf files stand alone)")


def refuse_part(folder: Path) -> None:
    """Raise `CheckpointError` where the folder's config.json is that of one part of a pipeline."""
    values = read_json(folder / "config.json")
    classes = values.get("architectures")
    name = values.get("_class_name") or (classes[0] if isinstance(classes, list) and classes else None)
    # A whole language model may lie anywhere.
    if (name in PART_CLASSES or "_class_name" in values) and (folder.parent / "model_index.json").exists():
        raise CheckpointError(f"{folder} is one part of a pipeline: pass the pipeline's folder, {folder.parent}")
    if name in PART_CLASSES:
        raise CheckpointError(f"{folder} holds {name} alone, {_as_part(PART_CLASSES[name], folder)}")
    if "_class_name" in values:
        raise CheckpointError(
            f"{folder} holds {name}, a model of diffusers that is not known here; known are {', '.join(PART_CLASSES)}, "
            "each as a part of a pipeline"
        )


def no_checkpoint(folder: Path) -> CheckpointError:
    """The error for a folder with neither config.json nor model_index.json, by what else it holds."""
    for name in sorted(set(PART_CLASSES.values())):
        part = folder / name
        if (part / "config.json").exists():
            return CheckpointError(f"{folder} has no model_index.json but a folder {name}, {_as_part(name, part)}")
    if (folder / "scheduler_config.json").exists():
        return CheckpointError(f"{folder} holds a scheduler alone, {_as_part('scheduler', folder)}")
    for file in sorted(folder.glob("*.safetensors")):
        if (hint := _single_file(file)) is not None:
            return CheckpointError(hint)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds {', '.join(pickles)} and no config.json: pickle files can run code and are never read; "
            "convert them with the library that wrote them, and save_pretrained(new_folder)"
        )
    return CheckpointError(f"{folder} holds neither config.json nor model_index.json: give a checkpoint's folder")


def _as_part(name: str, folder: Path) -> str:
    return (
        "which is a part of a pipeline: load the pipeline that it belongs to and put it in, "
        f"load('path/to/pipeline', parts={{{name!r}: {str(folder)!r}}})"
    )


def _single_file(path: Path) -> str | None:
    """What to do with a safetensors file in a layout of neither transformers nor diffusers; None for another one."""
    try:
        with safe_open(path, "numpy") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        return f"{path} is damaged ({error}): fetch it again"
    if any("lora" in name.lower() for name in names):
        return f"{path} holds an adapter: load its base model instead, or merge the two in the library that wrote it"
    for start, pipeline in SINGLE_FILES:
        if any(name.startswith(start) for name in names):
            converted = f"diffusers.{pipeline}.from_single_file({str(path)!r}).save_pretrained(new_folder)"
            return f"{path} is a Stable Diffusion in a single file: convert it once, {converted}, and load that folder"
    if any(name.startswith("decoder.up.") for name in names):
        return (
            f"{path} is an autoencoder in a single file: convert it once, diffusers.AutoencoderKL.from_single_file("
            f"{str(path)!r}).save_pretrained(new_folder), and give it as load(..., parts={{'vae': new_folder}})"
        )
    return None
