"""A system to sample from: of a configuration, of a run that has trained, or of a function of your own."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax

import sysdpo_jax as sj
from experiments.own.appended import digest
from experiments.own.config import ConfigError, MeshConfig, TrainConfig, read_config
from experiments.own.importing import import_object
from experiments.own.run import CONFIG, Run, assemble, make_trainer
from experiments.own.system import build_system
from sysdpo_jax.typing import Params

# The newest checkpoint of a run, or the one that evaluation found best.
Which: TypeAlias = Literal["newest", "best"]


class Loaded(NamedTuple):
    """A system with its parameters. identity: tells it from others that the same words may stand for."""

    system: sj.CompoundSystem
    params: Params
    identity: str


def load_system(spec: str, checkpoint: Which) -> Loaded:
    """spec: a YAML file, the folder of a run, or "module:function". Raises `ConfigError` for anything else.

    checkpoint: of a run's folder. Of several processes each has the whole system on its own devices, to sample at its
    own pace.
    """
    path, alone = Path(spec), jax.process_count() == 1
    if path.is_dir():
        run = assemble(replace(read_config(path / CONFIG, TrainConfig), mesh=MeshConfig()))
        params, step = restored(run, checkpoint)
        return Loaded(run.system, sj.on_own_devices(params), f"{digest(path / CONFIG)} step {step}")
    if not path.exists() and ":" in spec:
        system, params = import_object(spec, "--system")()
        return Loaded(system, params, spec)
    config = read_config(path, TrainConfig)
    components = {name: replace(component, mode="frozen") for name, component in config.system.components.items()}
    sizes = config.mesh if alone else MeshConfig(tensor=config.mesh.tensor)
    mesh = sj.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, jax.local_devices())
    made = build_system(replace(config, system=replace(config.system, components=components)), mesh)
    return Loaded(*made, digest(path))


def restored(run: Run, checkpoint: Which) -> tuple[Params, int]:
    """The parameters of a checkpoint of the run, which may be going on, and the step.

    Raises `ConfigError` where there is none.
    """
    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    with make_trainer(run).checkpoints(state, None, run.key, read_only=True) as checkpoints:
        step = checkpoints.latest if checkpoint == "newest" else checkpoints.best
        if step is None:
            lacks = "checkpoint: train first" if checkpoint == "newest" else "best checkpoint: give it an evaluation"
            raise ConfigError(f"{checkpoints.directory} holds no {lacks}")
        return checkpoints.restore(state, step).params, step
