"""Runs of the whole system, made and scored, and what they say beside those of the system before training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation import Estimate, clustered_mean, interval_figures, paired_difference
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.preferences import SHARE, Bounds
from sysdpo_jax.evaluation.scoring import Scorer, score_of, score_runs
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import note_of, read_json, write_json, write_json_lines
from sysdpo_jax.manifest import check_same, digest, fingerprints
from sysdpo_jax.parallel.distributed import all_gather
from sysdpo_jax.parallel.sharding import replicate_per_process
from sysdpo_jax.runs.runs_file import Line, Outcomes, keep_runs, read_lines, values_of, with_images
from sysdpo_jax.serving import gaps_in
from sysdpo_jax.training.evaluation import Evaluation, EvaluationError
from sysdpo_jax.training.progress import Lines
from sysdpo_jax.typing import Params, Record

FOLDER = "evaluation"
SCORE = "score"


@dataclass(frozen=True)
class RunScorer:
    """How runs are made and scored.

    scorer: a function of a run, or a judge, which is asked `parallel` questions at a time. skip: leaves a run without a
    score out. batch_size: runs that are sampled together; part of what is drawn. figures: further functions of a run,
    by name, cheap ones: they are asked again after a stop. about: tells scorers, and whatever else the runs depend on,
    from others.
    """

    system: CompoundSystem
    scorer: Scorer | Judge
    parallel: int
    skip: bool
    batch_size: int
    about: Mapping[str, str]
    figures: Mapping[str, Scorer] = field(default_factory=dict)

    def rows(
        self, path: Path, params: Params, prompts: Sequence[Record], samples: int, key: PRNGKeyArray, label: str
    ) -> list[Line]:
        """`samples` runs of each prompt, those of a prompt adjacent, as lines of a file with "score" and "figures".

        Of several processes each samples and scores its share of the batches on its own devices, and all return all
        rows; what is drawn does not depend on their number. What is there already, whatever ended an earlier call, a
        kill included, is taken. `discard(path)` removes it once the rows are written.

        Args:
            path: Of the file that the rows are for. Images lie beside it.
            params: Of the system, on the mesh of all processes or on each one's devices.
            label: Stands before the count on standard error.

        Raises:
            ScoreError: A run has no score, and is not to be skipped.
            ToolError: A tool stopped the runs.
        """
        own = replicate_per_process(params)
        index, count = jax.process_index(), jax.process_count()
        begun = _begun(path, {**self.about, "parameters": digest(fingerprints(own))})
        names = [f"{prompt}-{sample}" for prompt in range(len(prompts)) for sample in range(samples)]
        mine = [name for place, name in enumerate(names) if place // self.batch_size % count == index]
        done = frozenset(place for place, name in enumerate(names) if name in begun.made)
        lines, images, shard = Lines(f"{label}, runs", len(done), len(mine)), ImageFiles(path), (index, count)
        for batch in run_batches(self.system, own, prompts, key, samples, self.batch_size, shard, done):
            keep_runs(begun, self.system, prompts, ((names[place], run) for place, run in batch), images)
            if index == 0:
                lines.report(len(begun.made) + len(begun.failed), gaps_in(self.system))

        def values(name: str) -> Line:
            # Of the lines, as `sysdpo score` has them: a run has the same score after a stop as without one.
            return values_of(with_images(begun.made[name], path))

        def row(name: str) -> Line:
            line = begun.made.get(name) or begun.failed[name]
            scored = line | {"score": line.get("score")}
            if not self.figures or scored["score"] is None:
                return scored
            run = values(name)
            return scored | {"figures": {title: score_of(figure, run, name) for title, figure in self.figures.items()}}

        def keep(name: str, score: float) -> None:
            begun.add([{"id": name, "score": score}])

        waiting = [name for name, line in begun.made.items() if "score" not in line]
        score_runs(self.scorer, waiting, values, self.parallel, self.skip, keep)
        together = {line["id"]: line for lines in all_gather([row(name) for name in mine]) for line in lines}
        return [together[name] for name in names]


def _begun(path: Path, about: Mapping[str, str]) -> Outcomes:
    """What this process has of the runs of a file, and then of their scores, until the file is whole.

    What is there of one that was made in the same way is taken; of another one it is dropped: no evaluation can use it
    any more.
    """
    part = f"begun-{jax.process_index() + 1:05d}-of-{jax.process_count():05d}"
    own = path.with_name(f"{path.name}.{part}")
    if own.exists() and not (note_of(own).exists() and read_json(note_of(own)) == about):
        discard(path, part)
    return Outcomes(own, about)


def discard(path: Path, part: str = "begun-?????-of-?????") -> None:
    """Remove what all processes, or one of them, had of the runs of a file, with the notes of how they were made."""
    for own in path.parent.glob(f"{path.name}.{part}*"):
        own.unlink(missing_ok=True)


@dataclass(frozen=True)
class HeldOut:
    """What is measured: runs on the same prompts with the same noise at every evaluation.

    Of several processes each samples and scores its share of the batches on its own devices, and process 0 writes all:
    what is drawn does not depend on their number.
    maker: makes and scores the runs; the means of its figures are figures too. Evaluations of other makers than what
    its `about` says are not compared.
    folder: has runs-<step>.jsonl of every evaluation; that of step 0 is what later ones are compared with.
    made_by: tells what the runs depend on beside the parameters and what the maker says.
    """

    maker: RunScorer
    prompts: Sequence[Record]
    samples: int
    seed: int
    folder: Path
    made_by: str

    def measure(self, step: int, params: Params) -> dict[str, float]:
        """score, win_rate and score_difference, with their intervals where there are two prompts or more.

        The latter two are of pairs of runs, with the system before training; a tie counts half. runs, prompts: behind
        the figures. unscored: how many pairs of runs are left out because one has no score, or a tool
        failed. Raises `ScoreError` for a run without a score, or where `skip` leaves too few, and `ToolError`.

        Whatever ends it, a kill included, runs and scores that are there are taken when the step is measured again with
        the same parameters.
        """
        about = {**self.maker.about, "seed": str(self.seed), "made_by": self.made_by}
        maker, path, key = replace(self.maker, about=about), self.path(step), jax.random.key(self.seed)
        now = maker.rows(path, params, self.prompts, self.samples, key, f"evaluation at step {step}")
        # Of other processes' figures only the names count.
        first = now
        if jax.process_index() == 0:
            if step == 0:
                write_json(note_of(path), self.maker.about)
            write_json_lines(path, now)
            discard(path)
            first = list(read_lines(self.path(0)))
        return _figures(now, first, self.samples, self.maker.figures)

    def difference(self, name: str, step: int, earlier: int) -> Estimate:
        """How a figure (the score, or one of the maker's) changed between two evaluations, of runs that have both.

        Its interval is None where fewer than two prompts have such runs. Raises `ScoreError` where none has.
        """
        rows = [list(read_lines(self.path(at))) for at in (step, earlier)]
        now, then = (_column(each, name) for each in rows)
        both = np.isfinite(now) & np.isfinite(then)
        if not both.any():
            raise ScoreError(f"no run has a {name} at step {step} and at step {earlier}: fix the scorer")
        now, then, prompts = now[both], then[both], np.flatnonzero(both) // self.samples
        if len(np.unique(prompts)) < 2:
            return Estimate(float((now - then).mean()), float("nan"), len(now))
        return paired_difference(now, then, prompts, _bounds(now, then))

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
            check_same(str(note), {"evaluation": read_json(note)}, {"evaluation": self.maker.about}, remedy)

    def path(self, step: int) -> Path:
        """The runs of a step's evaluation."""
        return self.folder / runs_name(step)


def runs_name(step: int) -> str:
    """The file of the runs of a step's evaluation."""
    return f"runs-{step:08d}.jsonl"


def _column(rows: Sequence[Record], name: str) -> Float[np.ndarray, "runs"]:
    """A figure of each run, NaN for a run without a score."""
    values = (row[SCORE] if name == SCORE else row.get("figures", {}).get(name) for row in rows)
    return np.array(list(values), np.float64)


def _bounds(*values: Float[np.ndarray, "runs"]) -> Bounds | None:
    """Right or wrong: the mean is a share."""
    return SHARE if np.isin(values, (0, 1)).all() else None


def _figures(runs: Sequence[Record], first: Sequence[Record], samples: int, further: Iterable[str]) -> dict[str, float]:
    scores, before = _column(runs, SCORE), _column(first, SCORE)
    both = np.isfinite(scores) & np.isfinite(before)
    now, then, prompts = scores[both], before[both], np.flatnonzero(both) // samples
    number, alone, bounds = len(np.unique(prompts)), samples == len(scores), _bounds(now, then)
    if number < (1 if alone else 2):
        raise ScoreError(_too_few_scores(list(zip(runs, first, strict=True)), len(now)))
    columns = {
        "score": (now, bounds),
        "win_rate": ((np.sign(now - then) + 1) / 2, SHARE),
        "score_difference": (now - then, bounds and (-1.0, 1.0)),
    }
    for name in further:
        column = _column(runs, name)[both]
        columns[name] = column, _bounds(column)
    figures: dict[str, float] = {}
    for name, (column, ends) in columns.items():
        # One prompt tells nothing of how others would differ.
        mean = {name: float(column.mean())}
        figures |= mean if alone else interval_figures(name, clustered_mean(column, prompts, ends))
    counts = {"runs": len(now), "prompts": number, "unscored": int((~both).sum())}
    return figures | {name: float(count) for name, count in counts.items()}


def _too_few_scores(pairs: Sequence[tuple[Record, Record]], number: int) -> str:
    """Why so few pairs of runs have two scores: a tool left one out, or the scorer found none."""
    errors = [error for pair in pairs if (error := next((run["error"] for run in pair if "error" in run), None))]
    unscored = len(pairs) - number - len(errors)
    said = [f"only {number} of {len(pairs)} runs have a score, and runs of two prompts are needed"]
    if errors:
        said.append(f"a tool left {len(errors)} out (the first: {errors[0]}): fix the tool, or evaluation.prompts")
    if unscored:
        said.append(f"{unscored} were made and have no score: fix the scorer or the judge's template")
    return "; ".join(said)
