"""The loop around the step: data, metrics, checkpoints, resuming, and stopping when a value is not finite.

Step k is the update made from `batch_at(k)`; a state or checkpoint of step s has made steps 0 ... s - 1.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.training.checkpoints import Checkpoints
from sysdpo_jax.training.identity import as_text, describe
from sysdpo_jax.training.metrics import MetricsLog
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.progress import ProgressFactory, progress
from sysdpo_jax.training.search import IntermediateSearch, SearchedBatches
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.step import PROCEED, Metrics, Objective, TrainStep, make_train_step
from sysdpo_jax.typing import Params


class NonFiniteError(FloatingPointError):
    """A step met a value that is not finite. step: its number; nodes: those to blame; the state before it is saved."""

    def __init__(self, step: int, nodes: tuple[str, ...], directory: Path):
        self.step, self.nodes = step, nodes
        blame = f"in node {', '.join(map(repr, nodes))}" if nodes else "in the loss or the update, in no single node"
        super().__init__(
            f"step {step} met a value that is not finite {blame}; the state before it is saved in {directory}: look at "
            f"the batch of that step, or lower the learning rate or the node's weight"
        )


@dataclass(frozen=True)
class Trainer:
    """Trains a system in a directory: checkpoints/, intermediates/, metrics.jsonl and TensorBoard events.

    mesh: the one the state was created on. checkpoint_every: steps between checkpoints, of which `keep` are kept; the
    last step is always saved. log_every: steps between rows of metrics. config: JSON values of the experiment (learning
    rates, data); like objective, system and optimiser they must be the same when the run resumes. progress: shows
    the bar.
    """

    system: CompoundSystem
    objective: Objective
    optimizer: SystemOptimizer
    directory: str | Path
    mesh: Mesh | None = None
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    progress: ProgressFactory = progress

    @cached_property
    def step(self) -> TrainStep:
        """The jitted step, compiled once for all calls of `fit`."""
        return make_train_step(self.system, self.objective, self.optimizer, self.mesh)

    def fit(
        self,
        state: TrainState,
        batch_at: Callable[[int], PyTree] | SearchedBatches,
        steps: int,
        key: PRNGKeyArray,
        resume: bool = True,
    ) -> TrainState:
        """Train until `steps` updates are made in all, from the newest checkpoint of the directory if there is one.

        state: from `create_state` (consumed); a resumed run must be given the same initial parameters.
        batch_at: batch of a step, a pure function of its number, so that no data is skipped or seen twice; or
        `SearchedBatches`, which keep what the policy drew in the directory's intermediates/.
        Raises `NonFiniteError` after saving the state before the bad step, and what making a batch raises after saving
        the state before that batch; `CheckpointMismatchError` when the directory
        belongs to another run; `FileExistsError` when `resume` is False and the directory holds a checkpoint.
        """
        with ExitStack() as stack:
            checkpoints = stack.enter_context(
                Checkpoints(
                    Path(self.directory) / "checkpoints",
                    state,
                    self.optimizer,
                    self._configuration(batch_at, key),
                    self.keep,
                )
            )
            state = _start(checkpoints, state, steps, resume)
            start = int(state.step)
            rank_zero = jax.process_index() == 0
            log = stack.enter_context(MetricsLog(self.directory, start)) if rank_zero else None
            report = stack.enter_context(self.progress(start, steps)) if rank_zero else None
            reader = _Reader(log, report, self.log_every, checkpoints.directory)
            batch_of, forget = self._source(batch_at)
            proceed: Array | np.bool_ = PROCEED
            try:
                for step in range(start, steps):
                    try:
                        batch = batch_of(step, state.params)
                    except Exception:
                        reader.settle()
                        checkpoints.save(state)
                        raise
                    state, metrics = self.step(state, batch, key, proceed)
                    proceed = metrics["finite"]
                    reader.take(step, metrics)
                    if (step + 1) % self.checkpoint_every == 0 or step + 1 == steps:
                        reader.settle()
                        oldest = checkpoints.oldest
                        checkpoints.save(state)
                        # The save has waited for the one before it, so that `oldest` is not all there is.
                        forget(oldest)
            except NonFiniteError:
                checkpoints.save(state)
                raise
        return state

    def _source(
        self, batch_at: Callable[[int], PyTree] | SearchedBatches
    ) -> tuple[Callable[[int, Params], PyTree], Callable[[int], None]]:
        """What gives the batch of (step, parameters), and what to tell the oldest checkpoint that may be resumed."""
        if not isinstance(batch_at, SearchedBatches):
            return lambda step, params: batch_at(step), lambda checkpoint: None
        if batch_at.system != self.system:
            raise ValueError("the SearchedBatches are of another system than the Trainer's: give both the same")
        search = IntermediateSearch(batch_at, Path(self.directory) / "intermediates")
        return search.batch, search.forget

    def _configuration(self, batch_at: Callable[[int], PyTree] | SearchedBatches, key: PRNGKeyArray) -> dict[str, str]:
        nodes = {f"node {node.name}": describe(node) for node in self.system.nodes}
        optimizers = {f"optimizer {name}": describe(component) for name, component in self.optimizer.components}
        return {
            **nodes,
            **optimizers,
            "ema_decay": describe(self.optimizer.ema_decay),
            "objective": describe(self.objective),
            "key": str(jax.device_get(jax.random.key_data(key)).tolist()),
            **_describe_batches(batch_at),
            **{f"config {name}": text for name, text in as_text(self.config).items()},
        }


def _describe_batches(batch_at: Callable[[int], PyTree] | SearchedBatches) -> dict[str, str]:
    """What is known of the batches: of a function nothing."""
    if not isinstance(batch_at, SearchedBatches):
        return {}
    return {"batches": describe(batch_at), "records": batch_at.fingerprint()}


class _Reader:
    """Reads each step's metrics after the next step is dispatched, so that the device never waits for the host."""

    def __init__(self, log: MetricsLog | None, report: Callable[[int, str], None] | None, every: int, directory: Path):
        self._log, self._report, self._every, self._directory = log, report, every, directory
        self._waiting: tuple[int, Metrics] | None = None

    def take(self, step: int, metrics: Metrics) -> None:
        self._read()
        self._waiting = (step, metrics)

    def settle(self) -> None:
        """Read what waits and put the rows on disk."""
        self._read()
        if self._log is not None:
            self._log.flush()

    def _read(self) -> None:
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        if not metrics["finite"]:
            bad = (name for name, value in metrics.items() if name.startswith("finite/") and not value)
            raise NonFiniteError(step, tuple(name.removeprefix("finite/") for name in bad), self._directory)
        if self._log is not None and step % self._every == 0:
            values = jax.device_get({k: v for k, v in metrics.items() if not k.startswith("finite")})
            self._log.write(step, values)
        if self._report is not None:
            self._report(step + 1, f"loss {float(metrics['loss']):.4f}")


def _start(checkpoints: Checkpoints, state: TrainState, steps: int, resume: bool) -> TrainState:
    latest = checkpoints.latest
    if latest is None:
        return state
    if not resume:
        raise FileExistsError(f"{checkpoints.directory} holds a checkpoint: resume, or choose another directory")
    restored = checkpoints.restore(state)
    if not int(state.step) <= latest <= steps:
        raise ValueError(
            f"{checkpoints.directory} holds step {latest}, which is not between the given state's step "
            f"{int(state.step)} and the {steps} steps asked for: choose another directory or more steps"
        )
    return restored
