"""Scores of runs by a function of your own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.own.config import ConfigError

Scorer = Callable[[Mapping[str, Any]], float]


def score_of(scorer: Scorer, run: Mapping[str, Any], name: str) -> float:
    """The run's score. name: its id, for errors. Raises `ConfigError` for a score that is no finite number."""
    try:
        score = scorer(run)
    except ConfigError as error:
        raise ConfigError(f"run {name}: {error}") from None
    except Exception as error:
        raise ConfigError(f"the scorer failed on run {name} ({type(error).__name__}: {error}): mend it") from error
    try:
        number = float(score)
    except (TypeError, ValueError):
        raise ConfigError(f"the score of run {name} is {score!r}, no number: mend the scorer") from None
    if not np.isfinite(number):
        raise ConfigError(f"the score of run {name} is {number}: mend the scorer, or leave the run out")
    return number


def score_runs(scorer: Scorer, runs: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "runs"]:
    """The scores of runs. Raises as `score_of`, naming the run by its number."""
    return np.array([score_of(scorer, run, str(number)) for number, run in enumerate(runs)], np.float64)
