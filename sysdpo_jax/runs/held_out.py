"""Evaluation of a run: the whole system on held-out prompts, scored beside what it produced before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float

from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.preferences import (
    SHARE,
    Bounds,
    Estimate,
    clustered_mean,
    interval_figures,
    paired_difference,
    win_rate,
)
from sysdpo_jax.evaluation.scoring import Scorer
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import note_of, read_json, write_json, write_json_lines
from sysdpo_jax.manifest import check_same
from sysdpo_jax.runs.begun import discard
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.runs.scored_runs import RunScorer
from sysdpo_jax.training.evaluation import Evaluation, EvaluationError
from sysdpo_jax.typing import Params

FOLDER = "evaluation"
SCORE = "score"


@dataclass(frozen=True)
class HeldOut:
    """What is measured: runs on the same prompts with the same noise at every evaluation.

    Of several processes each samples and scores its share of the batches on its own devices, and process 0 writes all:
    what is drawn does not depend on their number.
    folder: has runs-<step>.jsonl of every evaluation; that of step 0 is what later ones are compared with.
    made_by: tells what the runs depend on beside the parameters and what `about` says.
    figures: further functions of a run, by name, whose means are figures too.
    """

    system: CompoundSystem
    prompts: Sequence[Mapping[str, Any]]
    scorer: Scorer | Judge
    parallel: int
    skip: bool
    samples: int
    batch_size: int
    seed: int
    folder: Path
    about: Mapping[str, str]
    made_by: str
    figures: Mapping[str, Scorer] = field(default_factory=dict)

    def measure(self, step: int, params: Params) -> dict[str, float]:
        """score, win_rate and score_difference, with their intervals where there are two prompts or more.

        The latter two are of pairs of runs, with the system before training; a tie counts half. runs, prompts: behind
        the figures. unscored: how many pairs of runs are left out because one has no score, or a tool
        failed. Raises `ScoreError` for a run without a score, or where `skip` leaves too few, and `ToolError`.

        Whatever ends it, a kill included, runs and scores that are there are taken when the step is measured again with
        the same parameters.
        """
        about = {**self.about, "seed": str(self.seed), "made_by": self.made_by}
        made = RunScorer(self.system, self.scorer, self.parallel, self.skip, self.batch_size, about, self.figures)
        key, label = jax.random.key(self.seed), f"evaluation at step {step}"
        now = made.rows(self.path(step), params, self.prompts, self.samples, key, label)
        if jax.process_index() > 0:
            # Of its figures only the names count.
            return _estimates(now, now, self.samples, tuple(self.figures))
        if step == 0:
            write_json(note_of(self.path(0)), self.about)
        write_json_lines(self.path(step), now)
        discard(self.path(step))
        return _estimates(now, list(read_lines(self.path(0))), self.samples, tuple(self.figures))

    def difference(self, name: str, step: int, earlier: int) -> Estimate:
        """How a figure (the score, or one of `figures`) changed between two evaluations, of runs that have both.

        Its interval is None where fewer than two prompts have such runs. Raises `ScoreError` where none has.
        """
        rows = [list(read_lines(self.path(at))) for at in (step, earlier)]
        now, then = (_column(each, name) for each in rows)
        both = np.isfinite(now) & np.isfinite(then)
        if not both.any():
            raise ScoreError(f"no run has a {name} at step {step} and at step {earlier}: fix the scorer")
        prompts = self._prompts_of(both)
        now, then = now[both], then[both]
        if len(np.unique(prompts)) < 2:
            return Estimate(float((now - then).mean()), float("nan"), len(now))
        return paired_difference(now, then, prompts, _bounds(now, then))

    def _prompts_of(self, kept: Bool[np.ndarray, "runs"]) -> np.ndarray:
        return np.arange(len(kept))[kept] // self.samples

    def evaluation(self, every: int, stop_on: tuple[str, Literal["max", "min"], int] | None) -> Evaluation:
        """What a `Trainer` takes: `measure` every so many steps, with the end of training that `stop_on` describes."""

        def measured(step: int, params: Params) -> dict[str, float]:
            # What is wrong is named already.
            try:
                return self.measure(step, params)
            except (ConfigError, OSError) as error:
                raise EvaluationError(f"the evaluation at step {step}: {error}") from error

        return Evaluation(measured, every, stop_on)

    def check(self) -> None:
        """Raise `ConfigError` where the folder's first runs were made or scored in another way, or are missing."""
        note, began = note_of(self.path(0)), self.folder.parent / "checkpoints"
        if not self.path(0).exists() and any(path.name.isdigit() and path.name != "0" for path in began.glob("*")):
            raise ConfigError(
                f"{self.folder.parent} has trained without an evaluation, so that there are no runs from before "
                "training to compare with: leave evaluation out, or choose another directory"
            )
        if note.exists():
            remedy = "scores of two kinds are not compared; choose another directory, or give what it says"
            check_same(str(note), {"evaluation": read_json(note)}, {"evaluation": self.about}, remedy)

    def path(self, step: int) -> Path:
        """The runs of a step's evaluation."""
        return self.folder / runs_name(step)


def runs_name(step: int) -> str:
    """The file of the runs of a step's evaluation."""
    return f"runs-{step:08d}.jsonl"


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, "runs"]:
    """A figure of each run, NaN for a run without a score."""
    values = (row[SCORE] if name == SCORE else row.get("figures", {}).get(name) for row in rows)
    return np.array(list(values), np.float64)


def _bounds(*values: Float[np.ndarray, "runs"]) -> Bounds | None:
    """Right or wrong: the mean is a share."""
    return SHARE if np.isin(values, (0, 1)).all() else None


def _estimates(
    runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], samples: int, figures: Sequence[str]
) -> dict[str, float]:
    scores, before = _column(runs, SCORE), _column(first, SCORE)
    numbers, both = np.arange(len(scores)) // samples, np.isfinite(scores) & np.isfinite(before)
    now, then, prompts = scores[both], before[both], numbers[both]
    others = {name: _column(runs, name)[both] for name in figures}
    counts = {
        "runs": float(len(now)),
        "prompts": float(len(np.unique(prompts))),
        "unscored": float((~both).sum()),
    }
    if samples == len(scores) and len(now):
        # One prompt tells nothing of how others would differ.
        wins = float((np.sign(now - then).mean() + 1) / 2)
        means = {name: float(column.mean()) for name, column in others.items()}
        alone = {"score": float(now.mean()), "win_rate": wins, "score_difference": float((now - then).mean())}
        return {**alone, **means, **counts}
    if counts["prompts"] < 2:
        raise ScoreError(_too_few_scores(list(zip(runs, first, strict=True)), int(both.sum())))
    bounds = _bounds(now, then)
    figured = {name: clustered_mean(column, prompts, _bounds(column)) for name, column in others.items()}
    estimates = {
        "score": clustered_mean(now, prompts, bounds),
        "win_rate": win_rate(now, then, prompts),
        "score_difference": paired_difference(now, then, prompts, bounds),
        **figured,
    }
    ranged = [interval_figures(name, estimate) for name, estimate in estimates.items()]
    return {name: value for each in ranged for name, value in each.items()} | counts


def _too_few_scores(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], number: int) -> str:
    """Why so few pairs of runs have two scores: a tool left one out, or the scorer found none."""
    errors = [error for pair in pairs if (error := next((run["error"] for run in pair if "error" in run), None))]
    unscored = len(pairs) - number - len(errors)
    said = [f"only {number} of {len(pairs)} runs have a score, and runs of two prompts are needed"]
    if errors:
        said.append(f"a tool left {len(errors)} out (the first: {errors[0]}): fix the tool, or evaluation.prompts")
    if unscored:
        said.append(f"{unscored} were made and have no score: fix the scorer or the judge's template")
    return "; ".join(said)
