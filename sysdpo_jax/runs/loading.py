"""A system to sample from: of a configuration, of a run that has trained, or of a function of your own."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

import sysdpo_jax as sj
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import GraphError
from sysdpo_jax.manifest import digest
from sysdpo_jax.runs.config import MeshConfig, TrainConfig, as_dict
from sysdpo_jax.runs.files import CONFIG, find_config, read_config
from sysdpo_jax.runs.round_store import Which
from sysdpo_jax.runs.run import assemble, identity_of, read_origin, restored
from sysdpo_jax.runs.system import build_system
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import import_function, shown, user_code

# Of components and nodes: what a system that has not trained does not depend on.
TRAINING = ("mode", "lora", "learning_rate", "weight")


class Loaded(NamedTuple):
    """A system with its parameters.

    identity: tells it from others that the same words may stand for. Of a run it is that of all that made its weights
    (the system, data, objective and schedule, which may not change when the run goes on) and the step; of a file that
    of the system before training.
    """

    system: sj.CompoundSystem
    params: Params
    identity: str


def load_system(spec: str, checkpoint: Which) -> Loaded:
    """spec: a YAML file, a recipe, the folder of a run, or "module:function". Raises `ConfigError` for anything else.

    checkpoint: of a run's folder. Of several processes each has the whole system on its own devices, to sample at its
    own pace.
    """
    path, alone = Path(spec), jax.process_count() == 1
    if path.is_dir():
        config = replace(read_config(path / CONFIG), directory=str(path.absolute()), mesh=MeshConfig())
        run = assemble(config)
        params, step = restored(run, checkpoint)
        return Loaded(run.system, sj.replicate_per_process(params), f"{digest(identity_of(config))} step {step}")
    if not path.exists() and ":" in spec:
        return Loaded(*_made_by(spec), spec)
    config = read_config(find_config(spec))
    components = {name: replace(component, mode="frozen") for name, component in config.system.components.items()}
    sizes = config.mesh if alone else MeshConfig(tensor=config.mesh.tensor)
    mesh = sj.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, jax.local_devices())
    origin, identity = None, _before_training(config)
    if config.init_from:
        origin = read_origin(config)
        origin = replace(origin, params=sj.replicate_per_process(origin.params))
        identity |= {"init_from": config.init_from, "init_step": origin.step}
    made = build_system(replace(config, system=replace(config.system, components=components)), mesh, origin)
    return Loaded(*made, digest(identity))


def _before_training(config: TrainConfig) -> dict[str, Any]:
    """What decides about the system of a file: neither how its tools are called, nor what would be trained how."""
    system = as_dict(config.system)
    kept = {
        part: {name: {field: v for field, v in each.items() if field not in TRAINING} for name, each in parts.items()}
        for part, parts in system.items()
        if part != "inputs"
    }
    return {"system": system | kept, "dtype": config.dtype, "seed": config.seed}


def _made_by(spec: str) -> tuple[sj.CompoundSystem, Params]:
    """What the function "module:function" returns. Raises `ConfigError` for what is no system with its parameters."""
    function = import_function(spec, "--system")
    with user_code(f"--system: {spec}", ConfigError, (GraphError, ConfigError)):
        made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], sj.CompoundSystem)):
        raise ConfigError(f"--system: {spec} returned {shown({'value': made})}: return (system, parameters)")
    system, params = made
    try:
        system.check_params(params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--system: {spec}: {error}") from None
    return system, params
