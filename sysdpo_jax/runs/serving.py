"""The servers that a configuration names."""

from pathlib import Path

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.serving import Handover, Server, ServingError, served


def sampling_system(config: TrainConfig, system: CompoundSystem) -> CompoundSystem:
    """The system as runs of it are sampled: by servers where the configuration names them. Raises `ConfigError`."""
    handovers = {}
    for name, own in config.serve.items():
        if name not in system.param_keys:
            raise ConfigError(f"serve.{name} is no component: {meant(name, system.param_keys)}")
        if not own.url or not own.model:
            raise ConfigError(f"serve.{name}: a server needs url and model")
        folder = Path(own.folder or Path(config.directory or "runs") / "served")
        server = Server(own.url, own.model, own.engine, own.key, own.parallel, own.timeout, own.retries)
        handovers[name] = Handover(server, folder, name)
    try:
        return served(system, handovers, {name: own.max_gap for name, own in config.serve.items()})
    except ServingError as error:
        raise ConfigError(f"serve: {error}") from None
