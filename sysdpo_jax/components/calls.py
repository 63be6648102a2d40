"""Calls of a host function: several at a time, tried again, given up after a while.

All threads are daemons: Python cannot end a call that hangs, but the process can end beside it.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import TypeVar

import tenacity

from sysdpo_jax.threads import DaemonExecutor

logger = logging.getLogger(__name__)

# Seconds before the second try, twice as many before each next one, up to the last; each with up to a second of jitter.
FIRST_WAIT, LAST_WAIT = 1.0, 60.0

T = TypeVar("T")
R = TypeVar("R")


def tried(call: Callable[[], R], what: str, retries: int, worth: Callable[[BaseException], bool]) -> R:
    """What the call returns, in the first of 1 + retries tries that does not raise.

    what: names the call in the log. worth: whether an exception is worth another try. Raises what the last try raises.
    """

    def announce(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.warning(
            "%s failed (%s: %s); try %d of %d follows in %.1f s",
            what, type(error).__name__, error, state.attempt_number + 1, retries + 1, state.upcoming_sleep,
        )  # fmt: skip

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=tenacity.wait_exponential(FIRST_WAIT, LAST_WAIT) + tenacity.wait_random(0, FIRST_WAIT),
        retry=tenacity.retry_if_exception(worth),
        before_sleep=announce,
        reraise=True,
    )
    return retrying(call)


def within(seconds: float | None, call: Callable[[], R]) -> R:
    """What the call returns, made in a thread of its own if there is a limit. Raises `TimeoutError` past the limit."""
    if seconds is None:
        return call()
    thread = DaemonExecutor(1, "call")
    made = thread.submit(call)
    thread.shutdown(wait=False, cancel_futures=False)
    if not wait([made], seconds).done:
        raise TimeoutError(f"no result within {seconds:g} s")
    return made.result()


def side_by_side(call: Callable[[T], R], items: Sequence[T], threads: int, ends: Callable[[R], bool]) -> dict[int, R]:
    """`{place: what the call returned}` for the items, so many at a time; one at a time in the caller's own thread.

    ends: whether no further call begins after this result. Those under way are finished, so that items may be missing.
    Raises what a call raises, without waiting for the others.
    """
    results: dict[int, R] = {}
    if threads == 1:
        for place, item in enumerate(items):
            results[place] = call(item)
            if ends(results[place]):
                break
        return results
    waiting, running = iter(enumerate(items)), dict[Future[R], int]()
    pool, ended = DaemonExecutor(min(threads, len(items)), "call"), False
    try:
        while True:
            for place, item in islice(waiting, 0 if ended else threads - len(running)):
                running[pool.submit(call, item)] = place
            if not running:
                return results
            for made in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(made)
                results[place] = made.result()
                ended |= ends(results[place])
    finally:
        # After Ctrl-C too: what is under way ends on its own.
        pool.shutdown(wait=False)
