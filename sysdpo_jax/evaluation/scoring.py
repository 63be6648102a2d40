"""Scores of runs, by a function of your own or a judge behind HTTP."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation.judge import Judge, make_judge
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.io import file_digest
from sysdpo_jax.user_code import import_function, name_of, user_code

Scorer = Callable[[Mapping[str, Any]], float]
# The run of an id.
Read = Callable[[str], Mapping[str, Any]]
# Takes the id and the score of a run.
Keep = Callable[[str, float], None]
# (id, score) of runs; of one without a score the error that says why.
Scored = Generator[tuple[str, float | ScoreError], None, None]

T = TypeVar("T")
R = TypeVar("R")

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


def scores(scorer: Scorer | Judge, names: Iterable[str], read: Read, parallel: int, skip: bool) -> Scored:
    """(id, score) of runs as they come. A function scores one after the other, a judge `parallel` at a time.

    read: is called when a run's turn has come. skip: gives the error of one without a score.
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


def _judged(judge: Judge, names: Iterable[str], read: Read, parallel: int, skip: bool) -> Scored:
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


def as_completed(
    runner: asyncio.Runner, call: Callable[[T], Coroutine[Any, Any, R]], items: Iterable[T], parallel: int
) -> Iterator[R]:
    """What `call` returns for each of the items, as it comes, `parallel` of them at a time.

    What a call raises is raised when all that is there beside it was given; then, and where the caller stops or is
    interrupted, the other calls are cancelled.
    """
    waiting, running = iter(items), set[asyncio.Task[R]]()
    try:
        while True:
            for item in islice(waiting, parallel - len(running)):
                running.add(runner.get_loop().create_task(call(item)))
            if not running:
                return
            done, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in sorted(done, key=lambda task: task.exception() is not None):
                yield task.result()
    finally:
        runner.run(_cancelled(running))


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def score_runs(scorer: Scorer | Judge, names: Sequence[str], read: Read, parallel: int, skip: bool, keep: Keep) -> None:
    """Call `keep` with the id and the score of each run as it comes, and log how many have none; else as `scores`."""
    errors = list[ScoreError]()
    with closing(scores(scorer, names, read, parallel, skip)) as found:
        for name, score in found:
            if isinstance(score, ScoreError):
                errors.append(score)
            else:
                keep(name, score)
    if errors:
        said = len(errors), len(names), counted(errors), errors[-1]
        logger.warning("%d of %d runs have no score (%s); the last: %s", *said)


def counted(errors: Iterable[ScoreError]) -> str:
    """How many failures there are of each kind, the most frequent first: "the answer was cut: 5, ...: 1"."""
    kinds = Counter(error.reason for error in errors)
    return ", ".join(f"{reason}: {number}" for reason, number in kinds.most_common())


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
