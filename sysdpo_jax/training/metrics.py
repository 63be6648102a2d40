"""Metrics of a run: read from the device at the logging interval, kept in metrics.jsonl and TensorBoard events.

docs/metrics.md lists their names.
"""

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from sysdpo_jax.io import append_whole, write_json_lines
from sysdpo_jax.training.events import Events
from sysdpo_jax.training.metric_warnings import MetricWarnings
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.throughput import Meter, Throughput
from sysdpo_jax.training.tracker import Tracker

# How the names of figures begin that an evaluation measured.
EVALUATED = "eval/"
# What to do where metrics.jsonl cannot be written.
REMEDY = "make room for it, then give the same command again, which goes on from the newest checkpoint"


class NonFiniteError(FloatingPointError):
    """A step met a value that is not finite.

    Args:
        step: Its number.
        nodes: Those to blame.
        directory: Where the state before it is saved; None where it could not be.
    """

    def __init__(self, step: int, nodes: tuple[str, ...], directory: Path | None):
        self.step, self.nodes = step, nodes
        blame = f"in node {', '.join(map(repr, nodes))}" if nodes else "in the loss or the update, in no single node"
        saved = "could not be saved" if directory is None else f"is saved in {directory}"
        super().__init__(
            f"step {step} met a value that is not finite {blame}; the state before it {saved}: look at the batch of "
            f"that step, or lower the learning rate or the node's weight"
        )


class MetricsWriteError(OSError):
    """metrics.jsonl does not take a row: the message names the file, the step, the reason and the remedy."""


class MetricsLog:
    """Appends rows {"step": k, metric: value} to `directory`/metrics.jsonl and scalars to TensorBoard events.

    A value that is not finite is written as null. What `MetricWarnings` warns of is in the row, as "warnings", and on
    standard error. metrics.jsonl is what counts: a row that it does not take is a `MetricsWriteError`. TensorBoard and
    Weights & Biases end with a warning where they fail, see `Events` and `Tracker`.

    Args:
        directory: Of the run.
        start: The step that the run continues with; rows of it and later ones, left by a run that was killed after its
            last checkpoint, are removed, and TensorBoard is told to hide them; what was evaluated at a saved `start`
            stays.
        wandb: What wandb.init takes, such as {"project": "aligned"}, to send the scalars to Weights & Biases too: a run
            that goes on does so there. None: wandb is not imported.
        nodes: The system's, of which `MetricWarnings` looks at the figures.

    Raises:
        ImportError: If wandb is asked for and absent.
    """

    def __init__(
        self, directory: str | Path, start: int, wandb: Mapping[str, Any] | None = None, nodes: Sequence[str] = ()
    ):
        self._path = path = Path(directory) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tracker = None if wandb is None else Tracker(path.parent, wandb)
        rows = _truncate(path, start)
        self.evaluations = [row for row in rows if _evaluated(row)]
        self._watch = MetricWarnings(nodes, rows)
        # Without a buffer: what a full disk did not take must not be written again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._events = Events(path.parent, start)
        for row in self.evaluations:
            if row["step"] == start:
                self._events.scalars({name: value for name, value in row.items() if name != "step"}, start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            # What counts is on disk since the last `flush`.
            self._file.close()
        self._events.close()
        if self._tracker is not None:
            self._tracker.finish(exit_code=0 if error is None else 1)

    def write(self, step: int, metrics: Mapping[str, float | np.ndarray]) -> None:
        """Write one row, whole or not at all.

        Args:
            step: Of the values.
            metrics: `{name: scalar}`.

        Raises:
            MetricsWriteError: Where the file does not take it.
        """
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        warnings = self._watch.see({"step": step, **row})
        noted = {"warnings": warnings} if warnings else {}
        self._append(step, json.dumps({"step": step, **row, **noted}, allow_nan=False) + "\n")
        self._events.scalars(values, step)
        if self._tracker is not None:
            self._tracker.log({"step": step, **values})
        for text in warnings:
            tell(f"warning: {text}")
            self._events.text("warnings", text, step)

    def flush(self) -> None:
        """Return once the rows are on disk: before a checkpoint that counts on them.

        Raises:
            MetricsWriteError: Where they cannot be put there.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MetricsWriteError(f"{self._path} cannot be put on disk ({error.strerror}): {REMEDY}") from error
        self._events.flush()

    def _append(self, step: int, line: str) -> None:
        try:
            append_whole(self._file, line.encode())
        except OSError as error:
            raise MetricsWriteError(
                f"{self._path} does not take the row of step {step}, which will be missing ({error.strerror}): {REMEDY}"
            ) from error


class MetricsReader:
    """Reads the steps' metrics when a row is due, after the step that follows it is dispatched: no device waits.

    log, report: what takes rows and progress, None for nothing. throughput: what makes its part of a row. every: steps
    between rows; the step `final` makes one too. directory: of the checkpoints, for the message of `NonFiniteError`.
    best: the metric that `mean` averages, None for none.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        report: Callable[[int, str], None] | None,
        throughput: Throughput,
        every: int,
        directory: Path,
        best: str | None = None,
        final: int | None = None,
    ):
        self._log, self._report, self._throughput = log, report, throughput
        self._every, self._directory, self._best, self._final = every, directory, best, final
        # By the name of the metric that says whether the node is to blame.
        self._blamed = {f"finite/{node.name}": node.name for node in throughput.system.nodes}
        self._meter = Meter()
        self._waiting: list[tuple[int, Mapping[str, Array]]] = []
        self._values: list[float] = []

    def count(self, step: int, state: TrainState, batch: PyTree) -> None:
        """Count what a step is about to work on. batch: this process's rows, not placed."""
        if self._log is not None:
            self._meter = self._throughput.count(self._meter, step, state, batch)

    def take(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Keep the metrics of a step that is dispatched; read those before it if the last of them makes a row.

        Raises `NonFiniteError` for the first of them that met a value that is not finite, at most `every` steps late:
        the step keeps the state as it was before that one. Raises `ValueError` when there is no metric `best`.
        """
        if self._best is not None:
            require_metric(self._best, metrics)
        if self._waiting and self._waiting[-1][0] % self._every == 0:
            self._read()
        self._waiting.append((step, metrics))

    def settle(self) -> None:
        """Read what waits and put the rows on disk. Raises `NonFiniteError` as `take` does."""
        self._read()
        if self._log is not None:
            self._log.flush()

    def mean(self) -> float | None:
        """Mean of `best` over what was read since the last call: rows and settled steps. None when nothing was."""
        values, self._values = self._values, []
        return float(np.mean(values)) if values else None

    def _read(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        step, metrics = waiting[-1]
        values = jax.device_get(metrics)
        if not values["finite"]:
            raise self._error(waiting)
        if self._best is not None:
            self._values.append(float(values[self._best]))
        if self._log is not None and (step % self._every == 0 or step == self._final):
            self._meter, speed = self._throughput.read(self._meter, step, time.monotonic())
            unlogged = {"finite", *self._blamed}
            self._log.write(step, {name: x for name, x in values.items() if name not in unlogged} | speed)
        if self._report is not None:
            self._report(step + 1, f"loss {float(values['loss']):.4f}")

    def _error(self, waiting: list[tuple[int, Mapping[str, Array]]]) -> NonFiniteError:
        # A step after a bad one counts as bad too.
        step, metrics = next((step, metrics) for step, metrics in waiting if not metrics["finite"])
        bad = tuple(node for name, node in self._blamed.items() if not metrics.get(name, True))
        return NonFiniteError(step, bad, self._directory)


def require_metric(best: str, names: Collection[str]) -> None:
    """Raise `ValueError` where a step of these metrics lacks the one that says which checkpoint is the best."""
    if best not in names:
        raise ValueError(f"best: the step has no metric {best!r}, choose one of {', '.join(sorted(names))}")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a run.

    Args:
        path: Of its metrics.jsonl.

    Returns:
        The complete rows; a last one that a kill cut short is left out.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _truncate(path: Path, start: int) -> list[dict[str, Any]]:
    """Keep the rows of the steps before `start`, and what was evaluated at it: the kept ones.

    At step 0 nothing is saved that would tell the rows of another run from this one's.
    """
    if not path.exists():
        return []
    kept = 0 if start == 0 else start + 1
    rows = [row for row in read_metrics(path) if row["step"] < (kept if _evaluated(row) else start)]
    try:
        write_json_lines(path, rows)
    except OSError as error:
        raise MetricsWriteError(f"{path} cannot be written ({error.strerror}): {REMEDY}") from error
    return rows


def _evaluated(row: Iterable[str]) -> bool:
    return any(name.startswith(EVALUATED) for name in row)
