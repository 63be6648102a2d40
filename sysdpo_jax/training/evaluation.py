"""Evaluation between training steps: figures of the policy, the best of them, and when to stop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sysdpo_jax.training.checkpoints import Best
from sysdpo_jax.training.metrics import read_metrics
from sysdpo_jax.typing import Params

PREFIX = "eval/"


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and when.

    measure: function of the number of updates made and all parameters, on the host; its figures are logged as
    "eval/<name>". It runs in every process, where it must return the same. every: steps; it also runs before the first
    one and after the last. best: a figure and "max" or "min": the checkpoint of the best evaluation is kept.
    patience: evaluations in a row without a new best after which training stops; None: never.
    Raises `ValueError` for numbers below 1 and patience without `best`.
    """

    measure: Callable[[int, Params], Mapping[str, float]]
    every: int
    best: Best | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"Evaluation: every {self.every} and patience {self.patience} must be at least 1")
        if self.patience is not None and self.best is None:
            raise ValueError("Evaluation: patience needs `best`, the figure that has to improve")


class Evaluator:
    """The evaluations of one run. What earlier starts measured is read from the metrics in the directory."""

    def __init__(self, evaluation: Evaluation, directory: Path, start: int):
        self._evaluation = evaluation
        path = directory / "metrics.jsonl"
        rows = [row for row in (read_metrics(path) if path.exists() else []) if row["step"] < start]
        name = PREFIX + (evaluation.best[0] if evaluation.best else "")
        self._history: list[float] = [row[name] for row in rows if row.get(name) is not None]

    def due(self, step: int, last: int) -> bool:
        """Whether the state of `step` updates is to be measured. last: the step at which training ends."""
        return step % self._evaluation.every == 0 or step == last

    def measure(self, step: int, params: Params) -> tuple[dict[str, float], float | None]:
        """The figures under their names in the metrics, and the one that decides which checkpoint is best.

        Raises `ValueError` naming a figure that is not finite, or the deciding one where it is missing.
        """
        figures = {name: float(value) for name, value in self._evaluation.measure(step, params).items()}
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ValueError(f"the evaluation at step {step} has {name} = {value}: mend what measures it")
        logged = {PREFIX + name: value for name, value in figures.items()}
        if self._evaluation.best is None:
            return logged, None
        name = self._evaluation.best[0]
        if name not in figures:
            raise ValueError(f"the evaluation at step {step} has no {name!r}, only {', '.join(figures)}")
        self._history.append(figures[name])
        return logged, figures[name]

    @property
    def exhausted(self) -> bool:
        """Whether there was no new best for so long that training stops."""
        evaluation, history = self._evaluation, self._history
        if evaluation.best is None or evaluation.patience is None or not history:
            return False
        best = max(history) if evaluation.best[1] == "max" else min(history)
        return len(history) - 1 - history.index(best) >= evaluation.patience
