"""Evaluation during training: figures of the policy every few steps, and the end of a run that they improve no more."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.parallel.distributed import all_gather
from sysdpo_jax.training.checkpoints import Best, Checkpoints
from sysdpo_jax.training.metrics import EVALUATED, MetricsLog
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import name_of, user_code

SAFE = "fix it; the state is saved, and the same command goes on from it"


class EvaluationError(ValueError):
    """An evaluation gave no figure that can be used: the message names the step, the figure and the remedy."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a system trains, and when its figures end the training.

    Args:
        measure: (step, the policy's whole parameters) -> {name: finite number}, logged as "eval/<name>"; step counts
            the updates behind the parameters. A host function of its arguments alone, which keeps none of them: the
            next step consumes the parameters. All processes call it and must give the same names; process 0's figures
            count. On several processes it calls `replicate_per_process` of the parameters before it samples. Two
            figures <name>/low and <name>/high are the ends of the confidence interval of <name>.
        every: Steps between evaluations. The first state is evaluated too, and the last one.
        stop_on: (metric, "max" or "min", patience), such as ("eval/win_rate", "max", 3): training ends when so many
            evaluations one after the other were no better than the best one before them.

    Raises:
        ValueError: For an every below 1 and a stop_on of another form.
    """

    measure: Callable[[int, Params], Mapping[str, float]]
    every: int
    stop_on: tuple[str, Literal["max", "min"], int] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Evaluation: every {self.every} must be at least 1 step")
        if self.stop_on is None:
            return
        metric, mode, patience = self.stop_on
        if not metric.startswith(EVALUATED) or mode not in ("max", "min") or patience < 1:
            raise ValueError(
                f"Evaluation: stop_on {self.stop_on} must be a metric '{EVALUATED}<name>', 'max' or 'min', and a "
                "patience of at least 1 evaluation"
            )


class Evaluator:
    """The evaluations of one call of `Trainer.fit`, which ends at `steps`.

    best: as the Trainer's. log: what takes the rows, and has the earlier ones: what was evaluated is not evaluated
    again, and the patience goes on where it was. None on processes other than 0. waiting: around each measurement, see
    `StopRequests.waiting`.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        best: Best | None,
        log: MetricsLog | None,
        steps: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._evaluation, self._log, self._steps, self._waiting = evaluation, log, steps, waiting
        self._best = best[0] if best is not None and best[0].startswith(EVALUATED) else None
        rows = log.evaluations if log is not None else []
        # (step, the figure of `stop_on`) of the run's evaluations so far; process 0 alone has the log.
        self._seen: list[Sequence[Any]] = all_gather([(row["step"], self._figure(row)) for row in rows])[0]

    def ends(self, step: int, state: TrainState, checkpoints: Checkpoints, save: Callable[[], None]) -> bool:
        """Evaluate the state of so many updates where that is due: whether the training ends with it.

        save: makes the state the newest of the checkpoints. It is called first: however long the evaluation takes and
        whatever becomes of it, the state is safe. Raises `EvaluationError`.
        """
        last = self._seen[-1][0] if self._seen else -1
        if step > last and (step % self._evaluation.every == 0 or step == self._steps):
            save()
            figures = self._measure(step, state.params)
            if self._best is not None:
                checkpoints.grade(step, figures[self._best])
            if self._log is not None:
                self._log.write(step, figures)
                self._log.flush()
            self._seen.append((step, self._figure(figures)))
        return self._exhausted()

    def _measure(self, step: int, params: Params) -> dict[str, float]:
        measure = self._evaluation.measure
        what = f"the evaluation at step {step}, {name_of(measure)},"
        with self._waiting(), user_code(what, EvaluationError, (EvaluationError, RecordError), SAFE):
            measured = {f"{EVALUATED}{name}": float(value) for name, value in sorted(measure(step, params).items())}
        # The same numbers on all processes, so that all of them stop at the same step.
        figures: dict[str, float] = all_gather(measured)[0]
        for name, value in figures.items():
            if not math.isfinite(value):
                raise EvaluationError(
                    f"the evaluation at step {step} gave {value} for {name!r}: fix `measure`, or leave the figure "
                    "out; the state is saved, and the same command goes on from it"
                )
        stop_on = self._evaluation.stop_on
        for setting, metric in (("best", self._best), ("stop_on", None if stop_on is None else stop_on[0])):
            if metric is not None and metric not in figures:
                raise EvaluationError(
                    f"{setting}: the evaluation gave no {metric!r}, choose one of {', '.join(figures) or 'none'}"
                )
        return figures

    def _figure(self, figures: Mapping[str, Any]) -> float | None:
        """That of `stop_on`; a row of an earlier command may lack it."""
        return None if self._evaluation.stop_on is None else figures.get(self._evaluation.stop_on[0])

    def _exhausted(self) -> bool:
        """Whether the patience of `stop_on` is at its end; says so on standard error."""
        known = [(step, figure) for step, figure in self._seen if figure is not None]
        if self._evaluation.stop_on is None or not known:
            return False
        metric, mode, patience = self._evaluation.stop_on
        # Of equal ones the first.
        best_step, best = (max if mode == "max" else min)(known, key=itemgetter(1))
        if len(known) - 1 - known.index((best_step, best)) < patience:
            return False
        if self._log is not None:
            tell(
                f"training ends at step {self._seen[-1][0]}: {metric} was {best:.4g} at step {best_step} and no better "
                f"in {patience} evaluations since"
            )
        return True
