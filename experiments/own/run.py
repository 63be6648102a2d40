"""A run put together from its configuration, up to the first step."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

import sysdpo_jax as sj
from experiments.own.config import ConfigError, DataConfig, TrainConfig, read_config, write_config
from experiments.own.system import build_optimizer, build_system
from sysdpo_jax.data.records import hold_intermediates
from sysdpo_jax.training import Evaluation
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.search import IntermediateSearch
from sysdpo_jax.training.step import Objective
from sysdpo_jax.training.trainer import BatchSource
from sysdpo_jax.typing import Params

# What may change when a run goes on: where it lies, how it is watched, the machine, and what is only looked at.
FREE = (
    "directory",
    "mesh",
    "remat",
    "log_every",
    "checkpoint_every",
    "profile",
    "wandb",
    "resume",
    "preempted_exit_code",
)
# What the folder of a run says of it.
CONFIG, DATA = "config.yaml", "data.json"
# Which evaluation's checkpoint is the best.
BEST: tuple[str, Literal["max"]] = ("eval/win_rate", "max")


@dataclass(frozen=True)
class Run:
    """What a `Trainer` takes. params: also those that are not trained; reference is what they are at first."""

    config: TrainConfig
    mesh: Mesh
    system: sj.CompoundSystem
    params: Params
    optimizer: SystemOptimizer
    objective: Objective

    @property
    def key(self) -> PRNGKeyArray:
        """Of the noise of all steps."""
        return jax.random.key(self.config.seed + 1)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the configuration that must be the same when the run goes on."""
        return {name: value for name, value in asdict(self.config).items() if name not in FREE}


def assemble(config: TrainConfig) -> Run:
    """Load the models onto the mesh. Raises `ConfigError` and what loading raises, each naming the field or file."""
    mesh = sj.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    objective, optimizer = _objective(config), build_optimizer(config)
    system, params = build_system(config, mesh)
    optimizer.check(system)
    return Run(config, mesh, system, params, optimizer, objective)


def claim(run: Run) -> None:
    """Note the configuration in the run's folder. Raises `ConfigError` where it holds a run of another one."""
    path = Path(run.config.directory) / CONFIG
    if path.exists():
        noted = asdict(read_config(path, TrainConfig))
        differing = [name for name, value in run.identity.items() if noted[name] != value]
        if differing:
            raise ConfigError(f"{path} is of a run with another {', '.join(differing)}: choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_config(path, run.config)


def make_trainer(run: Run, evaluation: Evaluation | None = None) -> sj.Trainer:
    """The trainer of the run's directory."""
    config = run.config
    if not config.directory:
        raise ConfigError("directory is empty: name the folder of the run, for example runs/my_run")
    return sj.Trainer(
        run.system,
        run.objective,
        run.optimizer,
        config.directory,
        mesh=run.mesh,
        accumulate=config.schedule.accumulate,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        config=run.identity,
        profile=config.profile,
        evaluation=evaluation,
        best=None if evaluation is None else BEST,
        wandb=None if config.wandb is None else {"project": config.wandb},
    )


def read_preferences(data: DataConfig, system: sj.CompoundSystem) -> sj.Preferences:
    """The checked preferences. Raises `ConfigError` where there are none, `RecordError` naming file, row and field."""
    if not data.source:
        raise ConfigError("data.source is empty: give a JSONL or Parquet file of preferences, or a data set of the hub")
    return sj.load_preferences(data.source, system, data.reader, split=data.split, on_error=data.on_error)


def make_batches(run: Run, records: sj.Preferences) -> BatchSource:
    """The batches of the objective. Raises `ConfigError` where it does not go with the records."""
    schedule, objective = run.config.schedule, run.config.objective
    held = bool(run.system.intermediates) and hold_intermediates(run.system, records[:1])
    if objective.kind == "direct":
        if run.system.intermediates and not held:
            raise ConfigError(
                "objective.kind is direct, but the preferences hold no intermediate values "
                f"({', '.join(node.name for node in run.system.intermediates)}): set it to sampling to search for them"
            )
        shard = sj.batch_shard(run.mesh)
        return sj.preference_dataset(run.system, records, schedule.batch_size, run.config.seed, shard)
    final = sj.without_intermediates(run.system, records) if held else records
    return sj.SearchedBatches(
        run.system, final, schedule.batch_size, run.config.seed, objective.intermediates, objective.every
    )


def first_batch(run: Run, batches: BatchSource) -> PyTree:
    """The batch of step 0; intermediates are drawn for it, and not kept."""
    if isinstance(batches, sj.SearchedBatches):
        with TemporaryDirectory() as folder:
            return IntermediateSearch(batches, Path(folder)).batch(0, run.params)
    return batches(0) if callable(batches) else batches[0]


def _objective(config: TrainConfig) -> Objective:
    own = config.objective
    if own.kind == "direct":
        return sj.DirectObjective(own.beta, own.loss, own.label_smoothing)
    return sj.SamplingObjective(own.beta, own.loss, own.label_smoothing, chunk_size=own.chunk_size)
