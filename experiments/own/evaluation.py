"""Evaluation of a run: the whole system on held-out prompts, scored beside what it produced before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import sysdpo_jax as sj
from experiments.own.config import ConfigError, JudgeConfig
from experiments.own.prompts import read_prompts
from experiments.own.run import BEST, Run
from experiments.own.runs_file import as_row, read_lines, write_rows
from experiments.own.scoring import Scorer, make_scorer, parallel, score_runs
from sysdpo_jax.data.saving import ImageFiles
from sysdpo_jax.evaluation import clustered_mean, interval_figures, win_rate
from sysdpo_jax.training import Evaluation
from sysdpo_jax.training.distributed import gathered
from sysdpo_jax.training.progress import Lines
from sysdpo_jax.typing import Params

FOLDER = "evaluation"


@dataclass(frozen=True)
class HeldOut:
    """What is measured: runs on the same prompts with the same noise at every evaluation.

    Of several processes each samples and scores its share of the batches on its own devices, and process 0 writes all:
    what is drawn does not depend on their number.
    folder: has runs-<step>.jsonl of every evaluation; that of step 0 is what later ones are compared with.
    """

    system: sj.CompoundSystem
    prompts: Sequence[Mapping[str, Any]]
    scorer: Scorer
    threads: int
    samples: int
    batch_size: int
    seed: int
    folder: Path

    def measure(self, step: int, params: Params) -> dict[str, float]:
        """score and win_rate with their intervals; a tie with the system before training counts half."""
        numbered = [pair for pairs in gathered(self._own_runs(step, params)) for pair in pairs]
        now = [row for _, row in sorted(numbered, key=lambda pair: pair[0])]
        if jax.process_index() > 0:
            # Of its figures only the names count.
            return _estimates(_scores(now), _scores(now), self.samples)
        write_rows(self.path(step), now)
        before = list(read_lines(self.path(0)))
        if [run["inputs"] for run in now] != [run["inputs"] for run in before]:
            raise ConfigError(
                f"{self.path(0)} has runs of other prompts: the held-out prompts or samples changed under the run; "
                "give those that it began with, or choose another directory"
            )
        return _estimates(_scores(now), _scores(before), self.samples)

    def _own_runs(self, step: int, params: Params) -> list[tuple[int, Any]]:
        """(place, row) of the runs that this process makes; their images are written."""
        index, count = shard = jax.process_index(), jax.process_count()
        key, size = jax.random.key(self.seed), self.batch_size
        own = sj.on_own_devices(params)
        places = [place for place in range(len(self.prompts) * self.samples) if place // size % count == index]
        lines, made = Lines(f"evaluation at step {step}, runs", 0, len(places)), 0

        def progress(number: int) -> None:
            nonlocal made
            made += number
            if index == 0:
                lines.report(made, "")

        runs = sj.rollout(self.system, own, self.prompts, key, self.samples, size, progress, shard)
        scores = list(score_runs(self.scorer, runs, self.threads))
        images = ImageFiles(self.path(step))
        rows = []
        for place, run, score in zip(places, runs, scores, strict=True):
            name = f"{place // self.samples}-{place % self.samples}"
            rows.append((place, as_row(self.system, run, name, images) | {"score": score}))
        return rows

    def path(self, step: int) -> Path:
        """The runs of a step's evaluation."""
        return self.folder / runs_name(step)


def runs_name(step: int) -> str:
    """The file of the runs of a step's evaluation."""
    return f"runs-{step:08d}.jsonl"


def make_evaluation(run: Run) -> Evaluation | None:
    """The evaluation that the configuration asks for, None for none. Raises `ConfigError` for half of one."""
    config = run.config.evaluation
    if not config.prompts:
        if config.scorer or config.judge != JudgeConfig():
            raise ConfigError("evaluation.prompts is empty: give the held-out prompts too, or leave the scorer out")
        return None
    held_out = HeldOut(
        run.system,
        read_prompts(config.prompts, run.system),
        make_scorer(config.scorer, config.judge, "evaluation."),
        parallel(config.scorer, config.judge),
        config.samples,
        config.batch_size,
        run.config.seed,
        Path(run.config.directory) / FOLDER,
    )
    if len(held_out.prompts) < 2:
        raise ConfigError(f"evaluation.prompts {config.prompts} has one prompt: a standard error needs two or more")
    stop_on = None if config.patience is None else (*BEST, config.patience)
    return Evaluation(held_out.measure, config.every, stop_on)


def _scores(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "runs"]:
    return np.array([row["score"] for row in rows], np.float64)


def _estimates(scores: Float[np.ndarray, "runs"], before: Float[np.ndarray, "runs"], samples: int) -> dict[str, float]:
    prompts = np.arange(len(scores)) // samples
    score, wins = clustered_mean(scores, prompts), win_rate(scores, before, prompts)
    return {**interval_figures("score", score), **interval_figures("win_rate", wins), "runs": float(len(scores))}
