"""Scores of runs, by a function of your own or a judge behind HTTP."""

import asyncio
import logging
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.in_parallel import as_completed
from sysdpo_jax.evaluation.judge import Judge, make_judge
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.unscored import ScoreError, counted
from sysdpo_jax.io import file_digest
from sysdpo_jax.user_code import import_function, name_of, user_code

Scorer = Callable[[Mapping[str, Any]], float]

logger = logging.getLogger(__name__)


def make_scorer(scorer: str, judge: JudgeConfig, prefix: str) -> Scorer | Judge:
    """The function "module:name", or the judge. prefix: of both fields, for errors.

    Raises `ConfigError` for none or both, and for one that cannot be had.
    """
    if bool(scorer) == (judge != JudgeConfig()):
        raise ConfigError(f"give either {prefix}scorer or {prefix}judge.url with its model and template")
    if not scorer:
        return make_judge(judge, f"{prefix}judge")
    return import_function(scorer, f"{prefix}scorer")


def check_scorer(scorer: Scorer | Judge, names: Collection[str], of: str) -> None:
    """Raise `ConfigError` where a judge's template names other values than `names`. of: what has them, for errors."""
    if isinstance(scorer, Judge):
        scorer.template.check(names, of)


def score_of(scorer: Scorer, run: Mapping[str, Any], name: str) -> float:
    """The run's score. name: its id, for errors.

    Raises `ScoreError` for a scorer that fails, and for a score that is no finite number.
    """
    with user_code(f"the scorer {name_of(scorer)} on run {name}", ScoreError):
        score = scorer(run)
    try:
        number = float(score)
    except Exception:
        # Whatever it is, it has a way of its own to become a number.
        raise ScoreError(f"the score of run {name} is {score!r}, no number: fix the scorer") from None
    if not np.isfinite(number):
        raise ScoreError(f"the score of run {name} is {number}: fix the scorer, or leave the run out")
    return number


def scores(
    scorer: Scorer | Judge,
    names: Iterable[str],
    read: Callable[[str], Mapping[str, Any]],
    parallel: int,
    skip: bool,
) -> Generator[tuple[str, float | ScoreError], None, None]:
    """(id, score) of runs as they come. A function scores one after the other, a judge `parallel` at a time.

    read: the run of an id; it is called when its turn has come. skip: gives the error of one without a score.
    Raises as `score_of`, when all scores that are there were given.
    """
    if isinstance(scorer, Judge):
        yield from _judged(scorer, names, read, parallel, skip)
        return
    for name in names:
        try:
            found: float | ScoreError = score_of(scorer, read(name), name)
        except ScoreError as error:
            if not skip:
                raise
            found = error
        yield name, found


def _judged(
    judge: Judge, names: Iterable[str], read: Callable[[str], Mapping[str, Any]], parallel: int, skip: bool
) -> Generator[tuple[str, float | ScoreError], None, None]:
    connections = judge.client.connections(parallel)

    async def judged(name: str) -> tuple[str, float | ScoreError]:
        run = read(name)
        try:
            return name, await judge.score(connections, run)
        except ScoreError as error:
            named = ScoreError(f"run {name}: {error}", error.reason)
            if not skip:
                raise named from None
            return name, named
        except ConfigError as error:
            raise ConfigError(f"run {name}: {error}") from None

    with asyncio.Runner() as runner:
        try:
            yield from as_completed(runner, judged, names, parallel)
        finally:
            runner.run(connections.aclose())


def score_runs(
    scorer: Scorer | Judge,
    names: Sequence[str],
    read: Callable[[str], Mapping[str, Any]],
    parallel: int,
    skip: bool,
    keep: Callable[[str, float], None],
) -> None:
    """Call `keep` with the id and the score of each run as it comes, and log how many have none; else as `scores`."""
    errors = list[ScoreError]()
    with closing(scores(scorer, names, read, parallel, skip)) as found:
        for name, score in found:
            if isinstance(score, ScoreError):
                errors.append(score)
            else:
                keep(name, score)
    if errors:
        said = (len(errors), len(names), counted(errors), errors[-1])
        logger.warning("%d of %d runs have no score (%s); the last: %s", *said)


def about_scorer(scorer: str, judge: JudgeConfig) -> dict[str, str]:
    """What scores depend on: those of two scorers are not compared."""
    if scorer:
        return {"scorer": scorer}
    # Neither the place nor the limits of an answer: a run that had no score gets one under others.
    return {
        "judge.model": judge.model,
        "judge.template": file_digest(Path(judge.template)),
        "judge.answer": judge.answer,
        "judge.range": f"{judge.range[0]:g} to {judge.range[1]:g}",
        "judge.temperature": str(judge.temperature),
    }
