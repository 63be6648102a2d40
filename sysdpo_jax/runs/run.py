"""A run put together from its configuration, up to the first step."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

import sysdpo_jax as sj
from sysdpo_jax.data.formats import reader_of
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import file_digest, locked_folder, read_json
from sysdpo_jax.manifest import check_same, digest
from sysdpo_jax.objectives import Objective
from sysdpo_jax.report.outcome import BEST
from sysdpo_jax.runs.caches import prepared_folder
from sysdpo_jax.runs.config import DataConfig, MeshConfig, TrainConfig, Which
from sysdpo_jax.runs.files import CONFIG, DATA, find_config, read_config
from sysdpo_jax.runs.rounds import RoundStore
from sysdpo_jax.runs.serving import sampling_system
from sysdpo_jax.runs.system import Origin, build_optimizer, build_system
from sysdpo_jax.runs.system_config import CALLS, as_dict
from sysdpo_jax.training import SystemOptimizer
from sysdpo_jax.training.metrics import EVALUATED
from sysdpo_jax.training.progress import LINE_EVERY, tell
from sysdpo_jax.training.trainer import BatchSource, encoder
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import import_function, shown, user_code

# Of components and nodes: what a system that has not trained does not depend on.
TRAINING = ("mode", "lora", "learning_rate", "weight")
# What the folder of a run says of it.
KEPT = (CONFIG, DATA)
# What tools gave for its preferences: there from the first value on, whatever becomes of the run.
TOOL_VALUES = "tool_values.jsonl"


@dataclass(frozen=True)
class Run:
    """What a `Trainer` takes.

    Args:
        config: Of the run.
        mesh: The devices.
        system: The graph.
        params: Also those that are not trained; the reference is what they are at first.
        optimizer: Of what is trained.
        objective: What is minimised.
        origin: The step of the run that they are from, "init_step", where they are from one.
    """

    config: TrainConfig
    mesh: Mesh
    system: sj.CompoundSystem
    params: Params
    optimizer: SystemOptimizer
    objective: Objective
    origin: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> PRNGKeyArray:
        """Of the noise of all steps."""
        return jax.random.key(self.config.seed + 1)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the configuration that must be the same when the run goes on: `steps` and `rounds` may grow."""
        identity = identity_of(self.config)
        if not is_online(self.config):
            identity["schedule"].pop("steps")
        return identity


def assemble(config: TrainConfig) -> Run:
    """Load the models onto the mesh. Raises `ConfigError` and what loading raises, each naming the field or file."""
    mesh = sj.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    objective, optimizer = _objective(config), build_optimizer(config)
    origin = None if not config.init_from else read_origin(config)
    system, params = build_system(config, mesh, origin)
    optimizer.check(system)
    # What is wrong with the servers is said before anything is trained.
    sampling_system(config, system)
    return Run(config, mesh, system, params, optimizer, objective, {} if origin is None else {"init_step": origin.step})


def read_run(folder: Path, mesh: MeshConfig | None = None, needed: Sequence[str] = (CONFIG,)) -> TrainConfig:
    """The configuration of a run's folder, where it lies now. Raises `ConfigError` where it is none.

    mesh: By default that of all devices that are here, whatever it was trained on. needed: files that must be there.
    """
    for name in needed:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no folder of a run ({name} is missing): give what it trained in")
    return replace(read_config(folder / CONFIG), directory=str(folder.absolute()), mesh=mesh or MeshConfig())


def read_origin(config: TrainConfig) -> Origin:
    """The run that this one starts from. Raises `ConfigError` where it is none, or has no such checkpoint."""
    folder = Path(config.init_from)
    if config.directory and folder.resolve() == Path(config.directory).resolve():
        raise ConfigError(f"init_from {folder} is this run's own directory: choose another directory")
    try:
        noted = read_run(folder, config.mesh)
        params, step = restored(assemble(noted), config.init_checkpoint)
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from error
    return Origin(str(folder), noted.system.components, params, step)


def restored(run: Run, checkpoint: Which) -> tuple[Params, int]:
    """The parameters of a checkpoint of the run, which may be going on, and the step.

    Raises `ConfigError` where there is none.
    """
    if is_online(run.config):
        return round_store(run).restored(run.params, checkpoint)
    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    with make_trainer(run).checkpoints(state, None, run.key, read_only=True) as checkpoints:
        step = checkpoints.latest if checkpoint == "newest" else checkpoints.best
        if step is None:
            lacks = "checkpoint: train first" if checkpoint == "newest" else "best checkpoint: give it an evaluation"
            raise ConfigError(f"{checkpoints.directory} holds no {lacks}")
        return checkpoints.restore(state, step).params, step


def round_store(run: Run) -> RoundStore:
    """The rounds of an online run. Raises `ConfigError` for settings that no round can have."""
    own, schedule = run.config.online, run.config.schedule
    given = {**vars(own), "number": own.rounds, "sample_batch": own.batch_size}
    given |= {"steps": schedule.steps, "batch_size": schedule.batch_size}
    rounds = sj.Rounds(**{each.name: given[each.name] for each in fields(sj.Rounds)})

    def optimizer(steps: int) -> SystemOptimizer:
        # A round of few pairs has fewer steps, and a warm-up in proportion.
        shorter = replace(schedule, steps=steps, warmup=schedule.warmup * steps // schedule.steps)
        return build_optimizer(replace(run.config, schedule=shorter))

    return RoundStore(make_trainer(run), rounds, run.config.seed, optimizer)


def owned(config: TrainConfig) -> AbstractContextManager[None]:
    """The run's folder is this command's alone, from before it reads what may be long: process 0 of several has it."""
    writes = config.directory and not config.dry_run and jax.process_index() == 0
    return locked_folder(Path(config.directory)) if writes else nullcontext()


def refuse_others(run: Run, about: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming the fields and both values where the run's folder holds a run of others.

    Warns of more steps than before, whose schedule is another one. about: what `describe_data` says.
    """
    config, data = (Path(run.config.directory) / name for name in (CONFIG, DATA))
    remedy = "choose another directory, or give what it says"
    if config.exists():
        noted, now = read_config(config), run.config.schedule.steps
        check_same(str(config), replace(run, config=noted).identity, run.identity, remedy)
        before = noted.schedule.steps
        if now < before:
            raise ConfigError(
                f"schedule.steps was {before}, now {now}: a run may be given more steps, not fewer: choose another "
                "directory"
            )
        if now > before:
            tell(
                f"warning: schedule.steps grows from {before} to {now}, and the learning rate follows the cosine of "
                f"{now} steps from here on: what was trained before had that of {before} steps, which ended at 0"
            )
    if data.exists():
        # A field that came later stood for what it does by default.
        known = asdict(DataConfig()) | read_json(data)
        check_same(str(data), known | {"source": about["source"]}, about, remedy)


def describe_data(run: Run, records: sj.Preferences | None = None) -> dict[str, Any]:
    """What a run's folder and its model cards say of the preferences; without them of the prompts of its rounds."""
    about = {**asdict(run.config.data), **run.origin}
    if records is not None:
        return about | {"kept": len(records), "sha256": records.counts.sha256}
    prompts = run.config.online.prompts
    return about | {"source": prompts, "kept": None, "sha256": file_digest(Path(prompts))}


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """What made the weights of a run: all of its configuration but what it may go on without."""
    made = asdict(config) | {"system": as_dict(config.system)}
    for each in fields(config):
        if each.metadata.get("free"):
            made.pop(each.name)
    # Where preferences and prompts lie says nothing: what they are is in the run's folder.
    made["data"]["source"] = ""
    if is_online(config):
        for name in ("prompts", "rounds"):
            made["online"].pop(name)
    else:
        made.pop("online")
    return made


def is_online(config: TrainConfig) -> bool:
    """Whether the run makes its own preferences in rounds."""
    return bool(config.online.prompts)


def best_of(config: TrainConfig) -> tuple[str, Literal["max"]]:
    """Which evaluation's checkpoint is the best."""
    return (f"{EVALUATED}{config.online.stop_on[0]}", "max") if is_online(config) else BEST


def make_trainer(run: Run, evaluation: sj.Evaluation | None = None) -> sj.Trainer:
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
    data, folder = run.config.data, Path(run.config.directory)
    return sj.load_preferences(
        **vars(data) | {"reader": reader_of(data.reader, "data.reader")},
        system=run.system,
        params=sj.replicate_per_process(run.system.frozen_params(run.params)),
        cache=prepared_folder(run.config.prepared_cache, folder),
        tool_values=folder / TOOL_VALUES,
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


def make_batches(run: Run, records: sj.Preferences, seed: int | None = None) -> BatchSource:
    """The batches of the objective. seed: of their order, by default the run's.

    Raises `ConfigError` where it does not go with the records.
    """
    schedule, objective = run.config.schedule, run.config.objective
    seed = run.config.seed if seed is None else seed
    shard = sj.batch_shard(run.mesh)
    held = bool(run.system.intermediates) and records.held
    if objective.kind == "direct":
        if run.system.intermediates and not held:
            raise ConfigError(
                "objective.kind is direct, but the preferences hold no intermediate values "
                f"({', '.join(node.name for node in run.system.intermediates)}): set it to sampling to search for them"
            )
        rows, parts = schedule.batch_size, schedule.accumulate
        return sj.preference_dataset(run.system, records, rows, seed, shard, accumulate=parts)
    final = sj.without_intermediates(run.system, records) if held else records
    return sj.SearchedBatches(
        run.system, final, schedule.batch_size, seed, objective.intermediates, objective.every, shard
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
    try:
        return sj.DirectObjective(*common) if own.kind == "direct" else sj.SamplingObjective(*common, own.chunk_size)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from None


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
        run = assemble(read_run(path))
        params, step = restored(run, checkpoint)
        served = sampling_system(run.config, run.system)
        return Loaded(served, sj.replicate_per_process(params), f"{digest(identity_of(run.config))} step {step}")
    if not path.exists() and ":" in spec:
        return Loaded(*_made_by(spec), spec)
    config = read_config(find_config(spec))
    components = {name: replace(component, mode="frozen") for name, component in config.system.components.items()}
    sizes = config.mesh if alone else MeshConfig(tensor=config.mesh.tensor)
    mesh = sj.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, jax.local_devices())
    origin, system = None, as_dict(config.system, (*CALLS, *TRAINING))
    identity: dict[str, Any] = {"system": system, "dtype": config.dtype, "seed": config.seed}
    if config.init_from:
        origin = read_origin(config)
        origin = replace(origin, params=sj.replicate_per_process(origin.params))
        identity |= {"init_from": config.init_from, "init_step": origin.step}
    made, params = build_system(replace(config, system=replace(config.system, components=components)), mesh, origin)
    return Loaded(sampling_system(config, made, began=origin is None), params, digest(identity))


def _made_by(spec: str) -> tuple[sj.CompoundSystem, Params]:
    """What the function "module:function" returns. Raises `ConfigError` for what is no system with its parameters."""
    function = import_function(spec, "--system")
    with user_code(f"--system: {spec}", ConfigError, (sj.GraphError, ConfigError)):
        made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], sj.CompoundSystem)):
        raise ConfigError(f"--system: {spec} returned {shown({'value': made})}: return (system, parameters)")
    system, params = made
    try:
        system.check_params(params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--system: {spec}: {error}") from None
    return system, params
