"""Calls of a host function: several at a time, tried again, given up after a while.

All threads are daemons: Python cannot end a call that hangs, but the process can end beside it.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tenacity

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
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        fine, result = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no result within {seconds:g} s") from None
    if not fine:
        raise result
    returned: R = result
    return returned


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
    made: queue.SimpleQueue[tuple[int, Any, BaseException | None] | None] = queue.SimpleQueue()
    waiting, lock, stopped = iter(enumerate(items)), threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                taken = next(waiting, None)
            if taken is None:
                break
            try:
                result = call(taken[1])
                if ends(result):
                    stopped.set()
                made.put((taken[0], result, None))
            except BaseException as error:
                made.put((taken[0], None, error))
        made.put(None)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    working = len(workers)
    try:
        while working:
            outcome = made.get()
            if outcome is None:
                working -= 1
                continue
            place, result, error = outcome
            if error is not None:
                raise error
            results[place] = result
    finally:
        # After Ctrl-C too: what is under way ends on its own, and nothing else begins.
        stopped.set()
    return results
