"""A run put together from its configuration, up to the first step."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

import sysdpo_jax as sj
from sysdpo_jax.data.files import LINES, TABLE
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.scoring import check_scorer, make_scorer
from sysdpo_jax.io import read_json, write_json
from sysdpo_jax.locks import locked_folder
from sysdpo_jax.manifest import check_same
from sysdpo_jax.objectives import Objective
from sysdpo_jax.report.outcome import BEST
from sysdpo_jax.runs.caches import prepared_folder
from sysdpo_jax.runs.config import DataConfig, TrainConfig, as_dict
from sysdpo_jax.runs.files import CONFIG, read_config, write_config
from sysdpo_jax.runs.system import build_optimizer, build_system
from sysdpo_jax.training import Evaluation
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.progress import LINE_EVERY, tell
from sysdpo_jax.training.sources import encoder
from sysdpo_jax.training.trainer import BatchSource
from sysdpo_jax.typing import Params

# What may change when a run goes on: where it lies, how it is watched, the machine, and what is only looked at.
FREE = (
    "directory",
    "dry_run",
    "evaluation",
    "mesh",
    "remat",
    "log_every",
    "checkpoint_every",
    "profile",
    "wandb",
    "resume",
    "preempted_exit_code",
    "compilation_cache",
    "prepared_cache",
)
# What the folder of a run says of it.
DATA = "data.json"
# What tools gave for its preferences: there from the first value on, whatever becomes of the run.
TOOL_VALUES = "tool_values.jsonl"


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
        return identity_of(self.config)


def check_first(config: TrainConfig) -> None:
    """Raise `ConfigError` for what is wrong whatever the models are: before they are loaded, which takes a while.

    That is a field that must be given, a file that is missing, and an evaluation that is half given or whose scorer or
    judge cannot be had.
    """
    if not config.directory:
        raise ConfigError("directory is empty: name the folder of the run, for example runs/my_run")
    if not config.data.source:
        raise ConfigError("data.source is empty: give a JSONL or Parquet file of preferences, or a data set of the hub")
    for field, path in (("data.source", config.data.source), ("evaluation.prompts", config.evaluation.prompts)):
        if Path(path).suffix in (*LINES, *TABLE, ".txt") and not Path(path).exists():
            raise ConfigError(f"{field} {path} does not exist: give the file")
    own = config.evaluation
    if own.prompts:
        scorer = make_scorer(own.scorer, own.judge, "evaluation.")
        check_scorer(scorer, (*config.system.inputs, *config.system.nodes), "the system")
        return
    given = {"scorer": own.scorer, "judge": own.judge != JudgeConfig(), "ignore": own.ignore}
    names = [f"evaluation.{name}" for name, value in given.items() if value]
    if names:
        raise ConfigError(
            f"evaluation.prompts is empty: give the held-out prompts too, or leave {' and '.join(names)} out"
        )


def assemble(config: TrainConfig) -> Run:
    """Load the models onto the mesh. Raises `ConfigError` and what loading raises, each naming the field or file."""
    mesh = sj.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    objective, optimizer = _objective(config), build_optimizer(config)
    system, params = build_system(config, mesh)
    optimizer.check(system)
    return Run(config, mesh, system, params, optimizer, objective)


def owned(config: TrainConfig) -> AbstractContextManager[None]:
    """The run's folder is this command's alone, from before it reads what may be long: process 0 of several has it."""
    writes = config.directory and not config.dry_run and jax.process_index() == 0
    return locked_folder(Path(config.directory)) if writes else nullcontext()


def refuse_others(run: Run, about: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming the fields and both values where the run's folder holds a run of others.

    about: what `describe_data` says.
    """
    config, data = (Path(run.config.directory) / name for name in (CONFIG, DATA))
    remedy = "choose another directory, or give what it says"
    if config.exists():
        check_same(str(config), identity_of(read_config(config)), run.identity, remedy)
    if data.exists():
        # A field that came later stood for what it does by default.
        known = asdict(DataConfig()) | read_json(data)
        check_same(str(data), known | {"source": about["source"]}, about, remedy)


def check_run_dir(run: Run, about: Mapping[str, Any]) -> None:
    """Note the configuration and the data in the run's folder: once nothing can refuse the run any more."""
    folder = Path(run.config.directory)
    write_config(folder / CONFIG, run.config)
    write_json(folder / DATA, about)


def describe_data(run: Run, records: sj.Preferences) -> dict[str, Any]:
    """What a run's folder and its model cards say of the preferences."""
    return {**asdict(run.config.data), "kept": len(records), "sha256": records.counts.sha256}


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that must be the same when the run goes on."""
    fields = {name: value for name, value in asdict(config).items() if name not in FREE}
    # Where the preferences lie says nothing: what they are is in the run's folder.
    return fields | {"system": as_dict(config.system), "data": fields["data"] | {"source": ""}}


def make_trainer(run: Run, evaluation: Evaluation | None = None) -> sj.Trainer:
    """The trainer of the run's directory."""
    config = run.config
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
        best=BEST if config.evaluation.prompts else None,
        wandb=None if config.wandb is None else {"project": config.wandb},
    )


def read_preferences(run: Run) -> sj.Preferences:
    """The preferences, prepared and encoded. Raises `RecordError` naming file, row and field."""
    data = run.config.data
    return sj.load_preferences(
        data.source,
        run.system,
        data.reader,
        split=data.split,
        on_error=data.on_error,
        ignore=data.ignore,
        params=sj.replicate_per_process(run.system.frozen_params(run.params)),
        cache=prepared_folder(run.config.prepared_cache, Path(run.config.directory)),
        tool_values=Path(run.config.directory) / TOOL_VALUES,
        progress=_rate(),
    )


def _rate() -> Callable[[int], None]:
    """Says now and then how many rows are prepared, and how fast."""
    began = last = time.monotonic()

    def tell_rate(rows: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            tell(f"prepared {rows} rows, {rows / (now - began):.0f} a second")

    return tell_rate


def make_batches(run: Run, records: sj.Preferences) -> BatchSource:
    """The batches of the objective. Raises `ConfigError` where it does not go with the records."""
    schedule, objective = run.config.schedule, run.config.objective
    shard = sj.batch_shard(run.mesh)
    held = bool(run.system.intermediates) and records.held
    if objective.kind == "direct":
        if run.system.intermediates and not held:
            raise ConfigError(
                "objective.kind is direct, but the preferences hold no intermediate values "
                f"({', '.join(node.name for node in run.system.intermediates)}): set it to sampling to search for them"
            )
        return sj.preference_dataset(run.system, records, schedule.batch_size, run.config.seed, shard)
    final = sj.without_intermediates(run.system, records) if held else records
    return sj.SearchedBatches(
        run.system, final, schedule.batch_size, run.config.seed, objective.intermediates, objective.every, shard
    )


def first_batch(run: Run, batches: BatchSource) -> PyTree:
    """The batch of step 0, encoded; intermediates are drawn for it, and not kept."""
    encode = encoder(run.system, run.params)
    if isinstance(batches, sj.SearchedBatches):
        with TemporaryDirectory() as folder:
            return encode(IntermediateSearch(batches, Path(folder)).batch(0, lambda: run.params))
    return encode(batches(0) if callable(batches) else batches[0])


def _objective(config: TrainConfig) -> Objective:
    own = config.objective
    common = (own.beta, own.loss, own.label_smoothing, tuple(sorted(own.sft.items())))
    return sj.DirectObjective(*common) if own.kind == "direct" else sj.SamplingObjective(*common, own.chunk_size)
