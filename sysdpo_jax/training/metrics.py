"""Metrics of a run: read from the device at the logging interval, kept in metrics.jsonl and TensorBoard events.

docs/metrics.md lists their names.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from sysdpo_jax.io import append_whole, write_json_lines
from sysdpo_jax.training.progress import Report, tell
from sysdpo_jax.training.side_outputs import Events, Tracker
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.throughput import Throughput

# How the names of figures begin that an evaluation measured.
EVALUATED = "eval/"
# Rows that a warning looks back on, and the share of the margin that a node may carry.
WINDOW = 10
SHARE = 0.95
MARGINS, CHOSEN = "rewards/margins/", "rewards/chosen/"
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


class MetricWarnings:
    """Looks at the last rows and gives each warning once in a run.

    nodes: whose figures to look for in the rows. history: the rows of the run so far.
    """

    def __init__(self, nodes: Sequence[str] = (), history: Iterable[Mapping[str, Any]] = ()):
        self._nodes = tuple(nodes)
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._given: set[str] = set()
        for row in history:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What there is to warn of after one more row {"step": k, metric: value}."""
        if "rewards/chosen" not in row:
            # An evaluation, or an objective of other metrics.
            return []
        self._rows.append(row)
        if len(self._rows) < WINDOW:
            return []
        found = {"share": self._one_node(), "winner": self._falling()}
        new = {kind: text for kind, text in found.items() if text is not None and kind not in self._given}
        self._given.update(new)
        return [f"steps {self._rows[0]['step']} to {row['step']}: {text}" for text in new.values()]

    def _one_node(self) -> str | None:
        """One node has nearly all of the margin: the others learn next to nothing."""
        sizes = {name: abs(margin) for name, margin in self._means(MARGINS).items()}
        whole, name = sum(sizes.values()), max(sizes, key=sizes.__getitem__, default="")
        if len(sizes) < 2 or not sizes[name] > SHARE * whole:
            return None
        return (
            f"the node {name!r} carries {100 * sizes[name] / whole:.1f}% of the margin, so that the others learn next "
            "to nothing: lower its weight, or raise theirs"
        )

    def _falling(self) -> str | None:
        """The chosen values are less likely than under the reference in every row: batches alone would change sign."""
        values = self._values("rewards/chosen")
        if not (values < 0).all():
            return None
        nodes = [name for name, value in self._means(CHOSEN).items() if value < 0]
        return (
            f"rewards/chosen is below 0, {values.mean():.3g} in the mean: the policy gives the chosen values less "
            f"probability than the reference does, in {', '.join(map(repr, nodes)) or 'no single node'}: add an sft "
            "term for the node, lower the learning rate, or raise beta"
        )

    def _means(self, figure: str) -> dict[str, float]:
        """{node: mean} of the nodes that the last row has this figure of: not frozen ones."""
        return {n: self._values(f"{figure}{n}").mean() for n in self._nodes if f"{figure}{n}" in self._rows[-1]}

    def _values(self, metric: str) -> np.ndarray:
        """NaN, which compares as False, where a value was not finite."""
        return np.array([row.get(metric) for row in self._rows], np.float64)


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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
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
        line = json.dumps({"step": step, **row, **noted}, allow_nan=False) + "\n"
        try:
            append_whole(self._file, line.encode())
        except OSError as error:
            raise MetricsWriteError(
                f"{self._path} does not take the row of step {step}, which will be missing ({error.strerror}): {REMEDY}"
            ) from error
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


@dataclass
class MetricsReader:
    """Reads the steps' metrics when a row is due, after the step that follows it is dispatched: no device waits.

    log, report: what takes rows and progress, None for nothing. throughput: what makes its part of a row. every: steps
    between rows; the step `final` makes one too. directory: of the checkpoints, for the message of `NonFiniteError`.
    best: the metric that `mean` averages, None for none.
    """

    log: MetricsLog | None
    report: Report | None
    throughput: Throughput
    every: int
    directory: Path
    best: str | None
    final: int
    _waiting: list[tuple[int, Mapping[str, Array]]] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)

    def take(self, step: int, state: TrainState, batch: PyTree, metrics: Mapping[str, Array]) -> None:
        """Keep the metrics of a step that is dispatched; read those before it if the last of them makes a row.

        batch: what the step works on, this process's rows, not placed. Raises `NonFiniteError` for the first of them
        that met a value that is not finite, at most `every` steps late: the step keeps the state as it was before that
        one. Raises `ValueError` when there is no metric `best`.
        """
        if self.best is not None:
            require_metric(self.best, metrics)
        if self._waiting and self._waiting[-1][0] % self.every == 0:
            self._read()
        self._waiting.append((step, metrics))
        if self.log is not None:
            self.throughput.count(step, state, batch)

    def settle(self) -> None:
        """Read what waits and put the rows on disk. Raises `NonFiniteError` as `take` does."""
        self._read()
        if self.log is not None:
            self.log.flush()

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
        # By the metric that says whether the node is to blame.
        nodes = {f"finite/{node.name}": node.name for node in self.throughput.system.nodes}
        if not values["finite"]:
            # A step after a bad one counts as bad too.
            step, metrics = next((step, metrics) for step, metrics in waiting if not metrics["finite"])
            bad = tuple(node for name, node in nodes.items() if not metrics.get(name, True))
            raise NonFiniteError(step, bad, self.directory)
        if self.best is not None:
            self._values.append(float(values[self.best]))
        if self.log is not None and (step % self.every == 0 or step == self.final):
            logged = {name: x for name, x in values.items() if name not in {"finite", *nodes}}
            self.log.write(step, logged | self.throughput.read(step, time.monotonic()))
        if self.report is not None:
            self.report(step + 1, f"loss {float(values['loss']):.4f}")


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
