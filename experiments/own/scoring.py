"""Scores of runs, by a function of your own or a judge behind HTTP."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.own.appended import digest
from experiments.own.config import ConfigError, JudgeConfig
from experiments.own.importing import import_function
from experiments.own.judge import ScoreError, make_judge
from sysdpo_jax.user_code import name_of, user_code

Scorer = Callable[[Mapping[str, Any]], float]


def make_scorer(scorer: str, judge: JudgeConfig, prefix: str) -> Scorer:
    """The function "module:name", or the judge. prefix: of both fields, for errors.

    Raises `ConfigError` for none or both, and for one that cannot be had.
    """
    if bool(scorer) == (judge != JudgeConfig()):
        raise ConfigError(f"give either {prefix}scorer or {prefix}judge.url with its model and template")
    if not scorer:
        return make_judge(judge, f"{prefix}judge")
    return import_function(scorer, f"{prefix}scorer")


def parallel(scorer: str, judge: JudgeConfig) -> int:
    """How many runs are scored at a time: a function of your own need not bear more than one."""
    return 1 if scorer else judge.parallel


def score_of(scorer: Scorer, run: Mapping[str, Any], name: str) -> float:
    """The run's score. name: its id, for errors.

    Raises `ScoreError` for a score that is no finite number, and `ConfigError` where no run could have one.
    """
    with user_code(f"the scorer {name_of(scorer)} on run {name}", ScoreError, (ConfigError,)):
        try:
            score = scorer(run)
        except ConfigError as error:
            raise type(error)(f"run {name}: {error}") from None
    try:
        number = float(score)
    except Exception:
        # Whatever it is, it has a way of its own to become a number.
        raise ScoreError(f"the score of run {name} is {score!r}, no number: mend the scorer") from None
    if not np.isfinite(number):
        raise ScoreError(f"the score of run {name} is {number}: mend the scorer, or leave the run out")
    return number


def score_runs(
    scorer: Scorer, runs: Sequence[Mapping[str, Any]], names: Sequence[str], threads: int, skip: bool
) -> list[float | None]:
    """The scores of runs, whose ids are `names`. skip: None for one without a score. Raises as `score_of`."""

    def scored(run: Mapping[str, Any], name: str) -> float | None:
        try:
            return score_of(scorer, run, name)
        except ScoreError:
            if skip:
                return None
            raise

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(scored, runs, names))


def about_scorer(scorer: str, judge: JudgeConfig) -> dict[str, str]:
    """What scores depend on: those of two scorers are not compared."""
    if scorer:
        return {"scorer": scorer}
    return {
        "judge.model": judge.model,
        "judge.template": digest(Path(judge.template)),
        "judge.number": judge.number,
        "judge.temperature": str(judge.temperature),
    }
