"""The loop around the step: data, metrics, checkpoints, resuming, stopping when asked or at a value that is not finite.

Step k is the update made from `batch_at(k)`; a state or checkpoint of step s has made steps 0 ... s - 1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from sysdpo_jax.batch import encode_batch
from sysdpo_jax.data.batches import EpochBatches, Indexed, PreferenceBatches, read_ahead
from sysdpo_jax.data.intermediates import IntermediateSearch, SearchedBatches
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import locked_folder
from sysdpo_jax.manifest import as_text, describe
from sysdpo_jax.objectives.direct import DirectObjective
from sysdpo_jax.objectives.objective import Objective
from sysdpo_jax.parallel.sharding import replicate_per_process
from sysdpo_jax.training.checkpoints import Best, Checkpoints
from sysdpo_jax.training.evaluation import Evaluation, Evaluator
from sysdpo_jax.training.metrics import EVALUATED, MetricsLog, MetricsReader, NonFiniteError, require_metric
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.preemption import Preempted, StopNow, StopRequests, stop_requests
from sysdpo_jax.training.progress import ProgressFactory, progress, tell
from sysdpo_jax.training.side_outputs import Profile, import_wandb
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.step import PROCEED, TrainStep, make_train_step
from sysdpo_jax.training.throughput import Throughput
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import user_code

# What gives the batch of a step, see `Trainer.fit`.
BatchSource: TypeAlias = Callable[[int], PyTree] | SearchedBatches | Indexed[Any]
BatchOf: TypeAlias = Callable[[int, TrainState], PyTree]


@dataclass(frozen=True)
class Trainer:
    """Trains a system in a directory: checkpoints/, intermediates/, metrics.jsonl and TensorBoard events.

    Objective, system, optimiser and config must be the same when the run resumes.

    Args:
        system: The graph.
        objective: The loss.
        optimizer: From `make_optimizer`.
        directory: Of this run.
        mesh: The one the state was created on.
        accumulate: Parts of a batch, see `make_train_step`.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        keep: How many of the newest checkpoints are kept.
        best: A metric and "min" or "max", such as ("rewards/accuracies", "max"): the checkpoint with the best mean of
            it over the steps read since the one before is kept too; of a metric "eval/<name>" the one with the best
            such figure.
        log_every: Steps between rows of metrics, the last of all steps has one too; the host waits for the device at no
            other step but to evaluate and save.
        config: JSON values of the experiment (learning rates, data).
        progress: Shows the bar.
        profile: (first, last): the steps first ... last - 1 are traced by jax.profiler into profile/.
        evaluation: What measures "eval/<name>", see `Evaluation`; the state that it measures is saved, and it may
            change when the run resumes.
        wandb: See `MetricsLog`; the config goes there too.
        log_directory: Has metrics.jsonl and the events instead, which rounds of one run share.

    Raises:
        ValueError: For a profile that is no range of steps.
    """

    system: CompoundSystem
    objective: Objective
    optimizer: SystemOptimizer
    directory: str | Path
    mesh: Mesh | None = None
    accumulate: int = 1
    checkpoint_every: int = 100
    keep: int = 2
    best: Best | None = None
    log_every: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    progress: ProgressFactory = progress
    profile: tuple[int, int] | None = None
    evaluation: Evaluation | None = None
    wandb: Mapping[str, Any] | None = None
    log_directory: str | Path | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile {self.profile} must be (first, last) with 0 <= first < last")

    @cached_property
    def step(self) -> TrainStep:
        """The jitted step, compiled once for all calls of `fit`."""
        return make_train_step(self.system, self.objective, self.optimizer, self.mesh, self.accumulate)

    def fit(
        self,
        state: TrainState,
        batch_at: BatchSource,
        steps: int,
        key: PRNGKeyArray,
        resume: bool = True,
        accepted: Callable[[], None] | None = None,
    ) -> TrainState:
        """Train until `steps` updates are made in all, from the newest checkpoint of the directory if there is one.

        SIGTERM (on several processes: of any of them) ends the run after the step it is in: the state and the metrics
        are saved and `Preempted` is raised, which ends the script with exit code 0; so does Ctrl-C with
        `KeyboardInterrupt`, in one process. See `stop_requests`. A batch that does not come, or an evaluation that does
        not end, is left after a moment. The directory is this process's alone meanwhile.

        Args:
            state: From `create_state` (consumed); a resumed run must be given the same initial parameters.
            batch_at: Batch of a step, a pure function of its number, so that no data is skipped or seen twice; or what
                has it as an element (`preference_dataset`, or a dataset of Grain), which is read ahead in threads; or
                `SearchedBatches`, which keep what the policy drew in the directory's intermediates/. On several
                processes each gives its own rows, see `batch_shard`. Raw features are encoded by the state's frozen
                entries: the data of `epoch_batches` once, before the first step, other batches when they come.
            steps: Updates in all.
            key: Of the run's noise.
            resume: False refuses a directory that holds a checkpoint.
            accepted: Called by process 0 when nothing can refuse the run any more, before anything of it is written: to
                note in the directory what the run is. The first batch is made and the step traced with it by then; of
                `SearchedBatches`, which the policy draws, only what needs no draw is checked.

        Returns:
            The last state: of fewer steps where the evaluation's `stop_on` ends the training.

        Raises:
            InUseError: Where the directory is another process's; it says whose.
            NonFiniteError: After saving the state before the bad step.
            CheckpointMismatchError: If the directory belongs to another run.
            CorruptCheckpointError: If it holds damaged checkpoints only.
            FileExistsError: If `resume` is False and it holds a checkpoint.
            ValueError: For a `best` that neither the step nor an evaluation of the Trainer's gives.
            EvaluationError: And what else an evaluation raises, whose state is saved.
            CheckpointWriteError: On a full disk.
            MetricsWriteError: On a full disk, after saving the state where that can be done.
            Exception: What making a batch raises, after saving, in one process, the state before that batch, if it is
                not the first of the call; what tracing the step raises.
        """
        self._check(batch_at, steps)
        directory, rank_zero = Path(self.directory), jax.process_index() == 0
        own = locked_folder(directory) if rank_zero else nullcontext()
        with own, stop_requests(directory.absolute() / "checkpoints") as asked:
            with ExitStack() as stack:
                checkpoints = stack.enter_context(self.checkpoints(state, batch_at, key))
                state = _start(checkpoints, state, steps, resume)
                done = int(state.step)
                batch_of, forget = self._source(batch_at, done, state.params, stack)
                if done < steps:
                    batch_of = self._tried(batch_at, batch_of, state, key, asked)
                if rank_zero and accepted is not None:
                    accepted()
                log = stack.enter_context(self._log(done)) if rank_zero else None
                report = stack.enter_context(self.progress(done, steps)) if rank_zero else None
                speed, folder = Throughput(self.system, self.step.mesh), checkpoints.directory
                reader = MetricsReader(log, report, speed, self.log_every, folder, self._best_of_steps, steps - 1)
                profile = Profile(self.profile if rank_zero else None, directory / "profile")
                stack.callback(profile.close)

                def save() -> None:
                    checkpoints.save(state, reader.mean())

                def checkpoint() -> None:
                    reader.settle()
                    oldest = checkpoints.oldest
                    save()
                    # The save has waited for the one before it, so that `oldest` is not all there is.
                    forget(oldest)

                def rescue() -> bool:
                    """Save what there is after an error: whether it is saved."""
                    try:
                        save()
                        checkpoints.wait()
                    except Exception as error:
                        tell(f"warning: the state of step {done} is not saved: {error}")
                        return False
                    return True

                # An evaluation that is asked to stop is left: its state is saved.
                rest = self.best, log, steps, asked.waiting
                evaluator = None if self.evaluation is None else Evaluator(self.evaluation, *rest)

                def ends() -> bool:
                    return evaluator is not None and evaluator.ends(done, state, checkpoints, checkpoint)

                proceed: Array | np.bool_ = PROCEED
                try:
                    with suppress(StopNow):
                        while asked(done) is None and not ends() and done < steps:
                            # Errors keep their class; only `sys.exit` of a batch's code must not end the process.
                            with asked.waiting(), user_code(f"the batch of step {done}", RuntimeError, (Exception,)):
                                batch = batch_of(done, state)
                            profile.before(done)
                            state, metrics = self.step(state, batch, key, proceed)
                            proceed = metrics["finite"]
                            reader.take(done, state, batch, metrics)
                            profile.after(done, metrics)
                            done += 1
                            if done % self.checkpoint_every == 0:
                                checkpoint()
                    checkpoint()
                except Exception as error:
                    first = _first_cause(error, reader)
                    # Of several processes the others would join for a value that is not finite alone, which all meet.
                    saved = (jax.process_count() == 1 or isinstance(error, NonFiniteError)) and rescue()
                    if isinstance(first, NonFiniteError) and not saved:
                        first = NonFiniteError(first.step, first.nodes, None)
                    if first is error:
                        raise
                    raise first from error
            # Everything is on disk now.
            stop = asked(done)
        if stop is not None:
            if isinstance(stop, Preempted) and rank_zero:
                tell(str(stop))
            raise stop
        return state

    def checkpoints(
        self, state: TrainState, batch_at: BatchSource | None, key: PRNGKeyArray, read_only: bool = False
    ) -> Checkpoints:
        """The directory's, to be used as a context manager: `checkpoints.restore(state, checkpoints.best)` is the best
        state.

        Args:
            state: As for `fit`, which leaves it.
            batch_at: As for `fit`; with read_only it may be None.
            key: As for `fit`.
            read_only: Beside a run that may be going on.

        Returns:
            The checkpoints.
        """
        configuration = self._configuration(batch_at, key)
        directory = Path(self.directory) / "checkpoints"
        return Checkpoints(directory, state, configuration, self.keep, self.best, read_only)

    @property
    def _best_of_steps(self) -> str | None:
        """The metric of `best`, None where an evaluation gives it."""
        return None if self.best is None or self.best[0].startswith(EVALUATED) else self.best[0]

    def _log(self, start: int) -> MetricsLog:
        wandb = None if self.wandb is None else {"config": dict(self.config), **self.wandb}
        nodes = [node.name for node in self.system.nodes]
        return MetricsLog(self.directory if self.log_directory is None else self.log_directory, start, wandb, nodes)

    def _check(self, batch_at: BatchSource, steps: int) -> None:
        """What can be said against a run before anything of it is made."""
        if self.evaluation is None and self.best is not None and self._best_of_steps is None:
            raise ValueError(f"best {self.best} is a figure of an evaluation: give the Trainer one")
        if not callable(batch_at) and not isinstance(batch_at, SearchedBatches) and len(batch_at) < steps:
            raise ValueError(f"the dataset ends after {len(batch_at)} of the {steps} steps: repeat it")
        if isinstance(batch_at, SearchedBatches) and batch_at.system != self.system:
            raise ValueError("the SearchedBatches are of another system than the Trainer's: give both the same")
        if isinstance(batch_at, SearchedBatches) and isinstance(self.objective, DirectObjective):
            raise ValueError("objective: DirectObjective takes no SearchedBatches, give SamplingObjective")
        if self.wandb is not None and jax.process_index() == 0:
            import_wandb()

    def _source(
        self, batch_at: BatchSource, start: int, params: Params, stack: ExitStack
    ) -> tuple[BatchOf, Callable[[int], None]]:
        """What gives the batch of (step, state), and what to tell the oldest checkpoint that may be resumed.

        It is asked for the steps start, start + 1, ... while `stack` is open. params: whose frozen entries encode.
        """
        own = replicate_per_process(self.system.frozen_params(params))
        encode, forget = encoder(self.system, own), lambda checkpoint: None
        if isinstance(batch_at, SearchedBatches):
            search = IntermediateSearch(batch_at, Path(self.directory) / "intermediates")
            drawn = lambda step, state: search.batch(step, lambda: replicate_per_process(state.params))  # noqa: E731
            return lambda step, state: encode(drawn(step, state)), search.forget
        if isinstance(batch_at, EpochBatches):
            # Held whole: encoded once, before the first batch.
            whole = cache(lambda: replace(batch_at, data=encode(batch_at.data)))
            return lambda step, state: whole()(step), forget
        if callable(batch_at):
            return lambda step, state: encode(batch_at(step)), forget
        if isinstance(batch_at, PreferenceBatches):
            batch_at.prepare(own)
        batches: Iterator[PyTree] = stack.enter_context(read_ahead(batch_at, start))
        return lambda step, state: encode(next(batches)), forget

    def _tried(
        self, batch_at: BatchSource, batch_of: BatchOf, state: TrainState, key: PRNGKeyArray, asked: StopRequests
    ) -> BatchOf:
        """`batch_of`, once the step is traced with its first batch: whatever could refuse the run has been asked then.

        Batches that the policy draws take long and are written down: of those only what needs no draw is checked.
        """
        if isinstance(batch_at, SearchedBatches):
            self.step.check(state, batch_at.batch_size)
            return batch_of
        start, first = int(state.step), list[PyTree]()
        # A stop is seen before the first step.
        with suppress(StopNow):
            with asked.waiting():
                first.append(batch_of(start, state))
            names = self.step.metric_names(state, first[0], key)
            if self._best_of_steps is not None:
                require_metric(self._best_of_steps, names)
        return lambda step, state: first.pop() if step == start and first else batch_of(step, state)

    def _configuration(self, batch_at: BatchSource | None, key: PRNGKeyArray) -> dict[str, str]:
        described = [describe(f"node {node.name}", node) for node in self.system.nodes]
        described += [describe(f"optimizer {name}", component) for name, component in self.optimizer.components]
        described += [describe("ema_decay", self.optimizer.ema_decay), describe("objective", self.objective)]
        # Of a function or a dataset nothing is known.
        batches = batch_at.fingerprint() if isinstance(batch_at, PreferenceBatches | SearchedBatches) else {}
        return {
            # What is recomputed changes no result, and may change when a run goes on.
            **{path: text for texts in described for path, text in texts.items() if not path.endswith(".config.remat")},
            "key": str(jax.device_get(jax.random.key_data(key)).tolist()),
            **batches,
            **{f"config {name}": text for name, text in as_text(self.config).items()},
        }


def encoder(system: CompoundSystem, params: Params) -> Callable[[PyTree], PyTree]:
    """`encode_batch` by the frozen entries of `params`, on this process's own devices; all processes must call this."""
    return partial(encode_batch, system, replicate_per_process(system.frozen_params(params)))


def _first_cause(error: Exception, reader: MetricsReader) -> Exception:
    """The error, or that of a value that is not finite in the steps before it; the rows of those steps are written."""
    if isinstance(error, NonFiniteError):
        return error
    try:
        reader.settle()
    except NonFiniteError as earlier:
        return earlier
    except Exception as another:
        tell(f"warning: {another}")
    return error


def _start(checkpoints: Checkpoints, state: TrainState, steps: int, resume: bool) -> TrainState:
    # A directory of damaged checkpoints is not an empty one.
    if checkpoints.latest is None and not checkpoints.set_aside:
        return state
    if not resume:
        raise FileExistsError(f"{checkpoints.directory} holds a checkpoint: resume, or choose another directory")
    restored = checkpoints.restore(state)
    if not int(state.step) <= int(restored.step) <= steps:
        raise ValueError(
            f"{checkpoints.directory} holds step {int(restored.step)}, which is not between the given state's step "
            f"{int(state.step)} and the {steps} steps asked for: choose another directory or more steps"
        )
    return restored
