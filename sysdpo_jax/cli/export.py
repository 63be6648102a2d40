"""Write the aligned components of a run, each with a model card.

example:
  sysdpo export runs/my_run --output aligned

Every component that was trained gets a folder of its name, which transformers or diffusers load: with LoRA merged into
the weights or, with --adapters, as the factors alone. A component of your own writes its own files where it has a
method `save(path, params)`; of others the parameters are written, as parameters.safetensors.
"""

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

import sysdpo_jax as sj
from sysdpo_jax.data.files import ROW_FILES
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import locked_file, read_json, write_whole
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.checkpoint import new_folder
from sysdpo_jax.report.model_card import model_card
from sysdpo_jax.report.outcome import best_evaluation
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.config import Which
from sysdpo_jax.runs.run import DATA, KEPT, assemble, best_of, read_run, restored
from sysdpo_jax.training import read_metrics
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import name_of, user_code

# The run's folder may be given without its flag.
POSITIONAL = "directory"


@dataclass(frozen=True)
class Config:
    """What to export.

    Args:
        directory: Folder of the run.
        output: New folder to write the models to.
        checkpoint: Checkpoint to export: the newest, or the one that evaluation found best.
        adapters: Write only the LoRA factors of Hugging Face models, for PEFT and diffusers.
        compilation_cache: Where compiled programs are kept: user, none or a folder.
    """

    directory: Path
    output: Path
    checkpoint: Which = "newest"
    adapters: bool = False
    compilation_cache: str = "user"


def export(config: Config) -> list[Path]:
    """The folders written. Raises `ConfigError` where the directory holds no run, or nothing of it can be exported."""
    keep_compilations(config.compilation_cache)
    train = read_run(config.directory, needed=KEPT)
    trained = [name for name, component in train.system.components.items() if component.mode != "frozen"]
    if not trained:
        raise ConfigError(f"{config.directory}: no component of the run was trained")
    run = assemble(train)
    params, step = restored(run, config.checkpoint)
    rows = read_metrics(config.directory / "metrics.jsonl")
    best = best_evaluation(rows, best_of(train))
    if step == 0:
        why = "has not trained yet" if config.checkpoint == "newest" else "was never better than before training"
        raise ConfigError(f"{config.directory} {why}, so that there is nothing aligned to export: train on")
    if config.checkpoint == "newest" and best not in (None, 0, step):
        print(f"this is step {step}; the best evaluation was of step {best}: --checkpoint best", file=sys.stderr)
    data = read_json(config.directory / DATA)
    kept = [row for row in rows if row["step"] <= step]
    about = (run.system, asdict(train), data, kept, step, sj.__version__, best_of(train))
    written = []
    for name in trained:
        folder = config.output / name
        # Nodes that share the model differ in their prompts only.
        node = next(node for node in run.system.nodes if node.params_key == name and node.has_params)
        model, own = node.component, train.system.components[name]
        adapter = config.adapters and own.mode == "lora"
        if config.adapters and not adapter:
            print(f"{name} was trained whole: its whole model is written", file=sys.stderr)
        # A role belongs to the model that its base was loaded from.
        start = train.system.components[own.base or name].checkpoint
        named = {"base_model": start, "datasets": data["source"]}
        hub = {field: source for field, source in named.items() if source is not None and _on_hub(source)}
        with locked_file(folder):
            library = write_component(folder, model, node.tree(params), adapter, start)
            write_whole(folder / "README.md", model_card(name, library, hub, *about))
        written.append(folder)
    return written


def write_component(
    folder: Path, component: sj.Component, params: Params, adapter: bool, base_model: str | None
) -> str | None:
    """Write into a new folder; the library that loads it, None for none.

    adapter: LoRA factors alone, where they can be. Raises `FileExistsError` where the folder holds something, and what
    saving raises.
    """
    if isinstance(component, sj.LanguageModel | sj.Diffusion | sj.FlowMatching):
        text = isinstance(component, sj.LanguageModel)
        if adapter:
            sj.pretrained.save_adapter(folder, component, params, base_model)
            return "peft" if text else "diffusers"
        sj.pretrained.save(folder, component, params)
        return "transformers" if text else "diffusers"
    with new_folder(folder) as made:
        if hasattr(component, "save"):
            with user_code(f"{name_of(type(component))}.save", CheckpointError, (CheckpointError,)):
                component.save(made, params)
        else:
            # safetensors writes the memory of an array as it lies.
            arrays = {path: np.ascontiguousarray(jax.device_get(leaf)) for path, leaf in by_path(params).items()}
            save_file(arrays, made / "parameters.safetensors")
    return None


def _on_hub(source: str) -> bool:
    """The hub links names of its own, and refuses others."""
    path = Path(source)
    named = re.fullmatch(r"([\w.-]+/)?[\w.-]+", source) is not None
    return named and not path.exists() and path.suffix not in (*ROW_FILES, ".gguf")


def run(config: Config) -> None:
    """Export, and print the folders."""
    for folder in export(config):
        print(folder)
