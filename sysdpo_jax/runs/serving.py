"""The servers that a configuration names."""

from functools import cache
from pathlib import Path

import jax

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.runs.config import ServeConfig, TrainConfig
from sysdpo_jax.serving import Handover, Server, ServingError, served


def sampling_system(config: TrainConfig, system: CompoundSystem, began: bool = False) -> CompoundSystem:
    """The system as runs of it are sampled: by servers where the configuration names them. Raises `ConfigError`.

    began: whether all parameters are those that the components were loaded with, which servers have.
    """
    if config.serve and jax.process_count() > 1:
        raise ConfigError(f"serve is of one process, and there are {jax.process_count()}: leave it out")
    handovers, served_by = {}, dict[str, str]()
    for name, own in config.serve.items():
        if name not in system.param_keys:
            raise ConfigError(f"serve.{name} is no component: {meant(name, system.param_keys)}")
        if not own.url or not own.model:
            raise ConfigError(f"serve.{name}: a server needs url and model")
        mode = config.system.components[name].mode
        if own.url in served_by and "full" in (mode, config.system.components[served_by[own.url]].mode):
            raise ConfigError(
                f"serve.{name} and serve.{served_by[own.url]} have one server, which has whole weights of one model "
                "alone: give each a server, or train both by LoRA"
            )
        served_by[own.url] = name
        folder = Path(own.folder or Path(config.directory or "runs") / "served")
        # One that is frozen has the weights of another run where there is one.
        known = began or (mode == "frozen" and not config.init_from)
        handovers[name] = _handover(name, own, folder, not known)
    try:
        return served(system, handovers, {name: own.max_gap for name, own in config.serve.items()})
    except ServingError as error:
        raise ConfigError(f"serve: {error}") from None


@cache
def _handover(name: str, own: ServeConfig, folder: Path, trained: bool) -> Handover:
    """The one of this process: rollouts and evaluations of a run share what a server has."""
    place = f"serve.{name}."
    server = Server(own.url, own.model, own.engine, own.key, own.parallel, own.timeout, own.retries, place)
    return Handover(server, folder, name, trained)
