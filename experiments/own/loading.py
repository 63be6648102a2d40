"""A system to sample from: of a configuration, of a run that has trained, or of a function of your own."""

from dataclasses import replace
from pathlib import Path

import jax

import sysdpo_jax as sj
from experiments.own.appended import digest
from experiments.own.config import ConfigError, MeshConfig, TrainConfig, read_config
from experiments.own.evaluation import make_evaluation
from experiments.own.importing import import_object
from experiments.own.run import CONFIG, Run, assemble, make_batches, make_trainer, read_preferences
from experiments.own.system import build_system
from sysdpo_jax.typing import Params


def load_system(spec: str) -> tuple[sj.CompoundSystem, Params]:
    """spec: a YAML file, the folder of a run, or "module:function". Raises `ConfigError` for anything else.

    Of several processes each has the whole system of a YAML file on its own devices, to sample at its own pace.
    """
    path, alone = Path(spec), jax.process_count() == 1
    if path.is_dir():
        if not alone:
            raise ConfigError(
                f"{spec}: the folder of a run is sampled in one process; or export it, and name the exported models "
                "in a YAML file"
            )
        run = assemble(replace(read_config(path / CONFIG, TrainConfig), mesh=MeshConfig()))
        return run.system, restored(run)[0]
    if not path.exists() and ":" in spec:
        system, params = import_object(spec, "--system")()
        return system, params
    config = read_config(path, TrainConfig)
    components = {name: replace(component, mode="frozen") for name, component in config.system.components.items()}
    sizes = config.mesh if alone else MeshConfig(tensor=config.mesh.tensor)
    mesh = sj.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, jax.local_devices())
    return build_system(replace(config, system=replace(config.system, components=components)), mesh)


def identity(spec: str) -> str:
    """What tells two systems apart: the configuration, the newest checkpoint of a folder, a function's name."""
    path = Path(spec)
    if not path.is_dir():
        return digest(path) if path.exists() else spec
    steps = [int(file.name) for file in (path / "checkpoints").glob("*") if file.name.isdigit()]
    return f"{digest(path / CONFIG)} step {max(steps, default=None)}"


def restored(run: Run, best: bool = False) -> tuple[Params, int]:
    """The parameters of the run's newest checkpoint, or of its best one, and the step.

    Raises `ConfigError` where there is none.
    """
    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    # What was searched for is part of a run's identity; of other batches nothing is.
    sampled = run.config.objective.kind == "sampling"
    batches = make_batches(run, read_preferences(run)) if sampled else no_batch
    with make_trainer(run, make_evaluation(run)).checkpoints(state, batches, run.key) as checkpoints:
        step = checkpoints.best if best else checkpoints.latest
        if step is None:
            kind = "best checkpoint: it was trained without evaluation" if best else "checkpoint: train first"
            raise ConfigError(f"{checkpoints.directory} holds no {kind}")
        return checkpoints.restore(state, step).params, step


def no_batch(step: int) -> None:
    """For what reads checkpoints alone."""
