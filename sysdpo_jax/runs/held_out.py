"""Evaluation of a run: the whole system on held-out prompts, scored beside what it produced before training."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import sysdpo_jax as sj
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation import clustered_mean, interval_figures, paired_difference, too_few, win_rate
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.preferences import SHARE
from sysdpo_jax.evaluation.scoring import Scorer, about_scorer, make_scorer, score_runs
from sysdpo_jax.evaluation.unscored import ScoreError
from sysdpo_jax.io import file_digest, note_of, read_json, write_json, write_json_lines
from sysdpo_jax.manifest import check_same, digest, fingerprints
from sysdpo_jax.parallel.distributed import gathered
from sysdpo_jax.report.outcome import BEST
from sysdpo_jax.runs.begun import Begun, discard
from sysdpo_jax.runs.prompts import read_prompts
from sysdpo_jax.runs.run import Run
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.training import Evaluation
from sysdpo_jax.training.evaluation import EvaluationError
from sysdpo_jax.training.progress import Lines
from sysdpo_jax.typing import Params

FOLDER = "evaluation"


@dataclass(frozen=True)
class HeldOut:
    """What is measured: runs on the same prompts with the same noise at every evaluation.

    Of several processes each samples and scores its share of the batches on its own devices, and process 0 writes all:
    what is drawn does not depend on their number.
    folder: has runs-<step>.jsonl of every evaluation; that of step 0 is what later ones are compared with.
    made_by: tells what the runs depend on beside the parameters and what `about` says.
    """

    system: sj.CompoundSystem
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

    def measure(self, step: int, params: Params) -> dict[str, float]:
        """score, win_rate and score_difference, with their intervals where there are two prompts or more.

        The latter two are of pairs of runs, with the system before training; a tie counts half. runs, prompts: behind
        the figures. unscored: how many pairs of runs are left out because one has no score, or a tool
        failed. Raises `ScoreError` for a run without a score, or where `skip` leaves too few, and `ToolError`.

        Whatever ends it, a kill included, runs and scores that are there are taken when the step is measured again with
        the same parameters.
        """
        numbered = [pair for pairs in gathered(self._own_runs(step, params)) for pair in pairs]
        now = [row for _, row in sorted(numbered, key=lambda pair: pair[0])]
        if jax.process_index() > 0:
            # Of its figures only the names count.
            return _estimates(now, now, self.samples)
        if step == 0:
            write_json(note_of(self.path(0)), self.about)
        write_json_lines(self.path(step), now)
        discard(self.path(step))
        return _estimates(now, list(read_lines(self.path(0))), self.samples)

    def _own_runs(self, step: int, params: Params) -> list[tuple[int, Any]]:
        """(place, row) of the runs that this process makes; their images are written."""
        index, count = shard = jax.process_index(), jax.process_count()
        own = sj.replicate_per_process(params)
        about = {**self.about, "seed": str(self.seed), "made_by": self.made_by, "parameters": digest(fingerprints(own))}
        begun = Begun(self.path(step), about)
        size, names = self.batch_size, [f"{p}-{s}" for p in range(len(self.prompts)) for s in range(self.samples)]
        mine = [place for place in range(len(names)) if place // size % count == index]
        done = {place for place in mine if names[place] in begun.runs}
        lines, images = Lines(f"evaluation at step {step}, runs", len(done), len(mine)), ImageFiles(self.path(step))
        key = jax.random.key(self.seed)
        for batch in run_batches(self.system, own, self.prompts, key, self.samples, size, shard, frozenset(done)):
            stop = begun.add_runs(self.system, self.prompts, images, [(names[place], run) for place, run in batch])
            if stop is not None:
                raise stop
            done |= {place for place, _ in batch}
            if index == 0:
                lines.report(len(done), "")
        # Of the lines, as `sysdpo score` has them: a run has the same score after a stop as without one.
        waiting = [names[place] for place in mine if names[place] in begun.runs and names[place] not in begun.scores]
        score_runs(self.scorer, waiting, begun.values, self.parallel, self.skip, begun.add_score)
        return [(place, begun.row(names[place])) for place in mine]

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


def make_evaluation(run: Run) -> Evaluation | None:
    """The evaluation that the configuration asks for, None for none. Raises `ConfigError`, also as `HeldOut.check`."""
    config = run.config.evaluation
    if not config.prompts:
        return None
    scorer = make_scorer(config.scorer, config.judge, "evaluation.")
    held_out = HeldOut(
        run.system,
        read_prompts(config.prompts, run.system, config.ignore),
        scorer,
        config.judge.parallel,
        config.on_error == "skip",
        config.samples,
        config.batch_size,
        run.config.seed,
        Path(run.config.directory) / FOLDER,
        about_scorer(config.scorer, config.judge)
        | {
            "samples": str(config.samples),
            "batch_size": str(config.batch_size),
            "prompts": file_digest(Path(config.prompts)),
        },
        digest(run.identity),
    )
    held_out.check()
    few = too_few(len(held_out.prompts))
    if few and jax.process_index() == 0:
        print(f"warning: evaluation.prompts {config.prompts}: {few}", file=sys.stderr, flush=True)
    stop_on = None if config.patience is None else (*BEST, config.patience)
    return Evaluation(partial(_measured, held_out), config.every, stop_on)


def _measured(held_out: HeldOut, step: int, params: Params) -> dict[str, float]:
    """What `HeldOut.measure` says is wrong is named already."""
    try:
        return held_out.measure(step, params)
    except (ConfigError, OSError) as error:
        raise EvaluationError(f"the evaluation at step {step}: {error}") from error


def _scores(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "runs"]:
    """NaN for a run without a score."""
    return np.array([row["score"] for row in rows], np.float64)


def _estimates(runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    scores, before = _scores(runs), _scores(first)
    numbers, both = np.arange(len(scores)) // samples, np.isfinite(scores) & np.isfinite(before)
    now, then, prompts = scores[both], before[both], numbers[both]
    counts = {
        "runs": float(len(now)),
        "prompts": float(len(np.unique(prompts))),
        "unscored": float((~both).sum()),
    }
    if samples == len(scores) and len(now):
        # One prompt tells nothing of how others would differ.
        wins = float((np.sign(now - then).mean() + 1) / 2)
        return {"score": float(now.mean()), "win_rate": wins, "score_difference": float((now - then).mean()), **counts}
    if counts["prompts"] < 2:
        raise ScoreError(_too_few_scores(list(zip(runs, first, strict=True)), int(both.sum())))
    # Right or wrong: the score is a share.
    bounds = SHARE if np.isin([now, then], (0, 1)).all() else None
    return {
        **interval_figures("score", clustered_mean(now, prompts, bounds)),
        **interval_figures("win_rate", win_rate(now, then, prompts)),
        **interval_figures("score_difference", paired_difference(now, then, prompts, bounds)),
        **counts,
    }


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
