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
from experiments.own.runs_file import read_lines, write_runs
from experiments.own.scoring import Scorer, make_scorer, parallel, score_runs
from sysdpo_jax.evaluation import clustered_mean, interval_figures, win_rate
from sysdpo_jax.training import Evaluation
from sysdpo_jax.typing import Params

FOLDER = "evaluation"


@dataclass(frozen=True)
class HeldOut:
    """What is measured: runs on the same prompts with the same noise at every evaluation.

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
        key = jax.random.key(self.seed)
        runs = sj.rollout(self.system, params, self.prompts, key, self.samples, self.batch_size)
        write_runs(self.path(step), self.system, runs, self.samples, list(score_runs(self.scorer, runs, self.threads)))
        now, before = (list(read_lines(self.path(at))) for at in (step, 0))
        if [run["inputs"] for run in now] != [run["inputs"] for run in before]:
            raise ConfigError(
                f"{self.path(0)} has runs of other prompts: the held-out prompts or samples changed under the run; "
                "give those that it began with, or choose another directory"
            )
        scores, first = (np.array([run["score"] for run in each]) for each in (now, before))
        return _estimates(scores, first, self.samples)

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
    if jax.process_count() > 1:
        raise ConfigError(
            "evaluation: systems are sampled in one process only; leave it out, and evaluate what is exported"
        )
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


def _estimates(scores: Float[np.ndarray, "runs"], before: Float[np.ndarray, "runs"], samples: int) -> dict[str, float]:
    prompts = np.arange(len(scores)) // samples
    score, wins = clustered_mean(scores, prompts), win_rate(scores, before, prompts)
    return {**interval_figures("score", score), **interval_figures("win_rate", wins), "runs": float(len(scores))}
