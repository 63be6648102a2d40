"""Write the aligned components of a run, each with a model card.

    python -m sysdpo_jax.cli.export --directory runs/my_run --output aligned

Every component that was trained gets a folder of its name, which transformers or diffusers load: with LoRA merged into
the weights or, with --adapters, as the factors alone. A component of your own writes its own files where it has a
method `save(path, params)`; of others the parameters are written, as parameters.safetensors.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sysdpo_jax.cli.caches import keep_compilations
from sysdpo_jax.cli.card import model_card
from sysdpo_jax.cli.config import MeshConfig, TrainConfig, parse_flags, read_config
from sysdpo_jax.cli.ending import bounded_exit, user_errors
from sysdpo_jax.cli.exporting import write_component
from sysdpo_jax.cli.outcome import best_evaluation
from sysdpo_jax.cli.run import CONFIG, assemble, best_of, restored
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import write_whole
from sysdpo_jax.runs.round_store import Which
from sysdpo_jax.training import read_metrics


@dataclass(frozen=True)
class Config:
    """directory: of the run. output: a new folder. checkpoint: the newest, or the one that evaluation found best.

    adapters: write the LoRA factors of Hugging Face's models alone, for PEFT and diffusers. compilation_cache:
    of compiled programs, user, none or a folder.
    """

    directory: Path
    output: Path
    checkpoint: Which = "newest"
    adapters: bool = False
    compilation_cache: str = "user"


def export(config: Config) -> list[Path]:
    """The folders written. Raises `ConfigError` where the directory holds no run, or nothing of it can be exported."""
    keep_compilations(config.compilation_cache)
    if not (config.directory / CONFIG).is_file():
        raise ConfigError(f"{config.directory} is no folder of a run ({CONFIG} is missing): give what it trained in")
    train = read_config(config.directory / CONFIG, TrainConfig)
    trained = [name for name, component in train.system.components.items() if component.mode != "frozen"]
    if not trained:
        raise ConfigError(f"{config.directory}: no component of the run was trained")
    # On the devices that are here, whatever it was trained on, and where the folder is now.
    run = assemble(replace(train, directory=str(config.directory), mesh=MeshConfig()))
    params, step = restored(run, config.checkpoint)
    best = best_evaluation(read_metrics(config.directory / "metrics.jsonl"), best_of(train))
    if step == 0:
        why = "has not trained yet" if config.checkpoint == "newest" else "was never better than before training"
        raise ConfigError(f"{config.directory} {why}, so that there is nothing aligned to export: train on")
    if config.checkpoint == "newest" and best not in (None, 0, step):
        print(f"this is step {step}; the best evaluation was of step {best}: --checkpoint best", file=sys.stderr)
    about = model_card(config.directory, run, step)
    written = []
    for name in trained:
        folder = config.output / name
        # Nodes that share the model differ in their prompts only.
        model = next(node.component for node in run.system.nodes if node.params_key == name)
        adapter = config.adapters and train.system.components[name].mode == "lora"
        library = write_component(folder, model, params[name], adapter, train.system.components[name].checkpoint)
        write_whole(folder / "README.md", about(name, library))
        written.append(folder)
    return written


def main(arguments: list[str]) -> None:
    """Export, and print the folders."""
    with user_errors():
        config = parse_flags(Config, arguments, __doc__)
        for folder in export(config):
            print(folder)


if __name__ == "__main__":
    with bounded_exit():
        main(sys.argv[1:])
