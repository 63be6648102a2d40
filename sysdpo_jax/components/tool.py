"""A deterministic node: a parser, a template, a retriever, a call to a tool. No parameters, log-ratio exactly 0.

Calls go on several at a time, are tried again, and given up after a while. All their threads are daemons: Python cannot
end a call that hangs, but the process can end beside it.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import tenacity

from sysdpo_jax.components.base import RecordError, batch_size
from sysdpo_jax.components.deterministic import Deterministic
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.typing import Keys, Params, Parents
from sysdpo_jax.user_code import name_of, shown, user_code

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before the second try, twice as many before each next one, up to the last; each with up to a second of jitter.
FIRST_WAIT, LAST_WAIT = 1.0, 60.0
REMEDY = "fix it, or give the tool retries or a longer timeout where it may pass"
OR_SKIP = "; on_error: skip leaves such rows out"
_NOT_CALLED = object()


class ToolError(RecordError):
    """A tool gave no value for a row: the message names node, function, the parents' values and the reason.

    skip: the row may be left out, as the tool's on_error says. refused: the function raised `RecordError` or gave what
    does not fit the node, which speaks of these values and not of the function as such.
    """

    def __init__(self, message: str, skip: bool = False, refused: bool = False):
        super().__init__(message)
        self.skip, self.refused = skip, refused

    def at(self, place: str) -> "ToolError":
        """The same, with its place in front of the message."""
        named = type(self)(f"{place}: {self}", self.skip, self.refused)
        named.__cause__ = self.__cause__
        return named


class NotCalledError(ToolError):
    """A row for which the tool was not called, because a call before it failed and on_error is "stop"."""


@dataclass(frozen=True)
class Tool(Deterministic):
    """`function(*parent_values) -> value`, one row at a time, in the order of the node's parents.

    In a node with `plate=n` whose parents are not plates the function is called once a row and returns all n values
    (an answer split into three captions). With a plate among the parents it is called once a copy.
    Hashed by the function's identity: use a module-level function, not a lambda made anew for each system. How it is
    called is no part of what a system is: a run may go on with other values of all fields but the function.

    Args:
        function: Of the parents' values.
        concurrency: Calls at a time, in threads, which the function must bear. One at a time are made by the caller.
        retries: Further tries of a call that failed, after 1, 2, 4 ... seconds, at most a minute, with jitter. A
            `RecordError`, by which the function refuses its values, and `sys.exit` are not tried again.
        timeout: Seconds of a try, which then has failed. Python cannot end the function: it goes on in a thread beside
            the next try until it returns or the process ends.
        on_error: Of a call that failed for good. "stop" raises `ToolError` once the calls under way are finished;
            "skip" leaves the run or the record out, and counts it.

    Raises:
        ValueError: For a value that none of these can have.
    """

    function: Callable[..., Any]
    concurrency: int = field(default=1, compare=False)
    retries: int = field(default=0, compare=False)
    timeout: float | None = field(default=None, compare=False)
    on_error: Literal["stop", "skip"] = field(default="stop", compare=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"Tool: the function is {self.function!r}, which cannot be called: give a function")
        if self.concurrency < 1 or self.retries < 0 or not (self.timeout is None or 0 < self.timeout < math.inf):
            raise ValueError(
                f"Tool: concurrency {self.concurrency} must be at least 1, retries {self.retries} at least 0, timeout "
                f"{self.timeout} above 0 and finite, or None"
            )
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"Tool: on_error {self.on_error!r} is neither 'stop' nor 'skip'")

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        """Call the function once a row.

        Args:
            params: None, {}.
            parents: `{parent: values}`.
            key: Not used.

        Returns:
            A value for each row.

        Raises:
            ToolError: The first one, whatever on_error says: there is nothing to leave out.
        """
        outcomes = self.outcomes(parents)
        raise_first(outcomes, "row")
        return outcomes

    def outcomes(self, parents: Parents) -> list[Any]:
        """Call the function once a row, and keep what it can.

        Args:
            parents: `{parent: values}`.

        Returns:
            Of each row the value or the `ToolError`.
        """
        values = [{name: column[row] for name, column in parents.items()} for row in range(batch_size(parents, "Tool"))]
        made = _side_by_side(self._outcome, values, self.concurrency)
        why = next((outcome for outcome in made if _stops(outcome)), None)
        return [NotCalledError(f"not called after {why}") if one is _NOT_CALLED else one for one in made]

    def _outcome(self, values: Mapping[str, Any]) -> Any:
        what, skip = f"the tool {name_of(self.function)} for {shown(values)}", self.on_error == "skip"
        call = partial(_within, self.timeout, lambda: self.function(*values.values()))
        try:
            with user_code(what, partial(ToolError, skip=skip), (RecordError,), REMEDY + ("" if skip else OR_SKIP)):
                return _tried(call, what, self.retries)
        except ToolError as error:
            return error
        except RecordError as error:
            refusal = ToolError(f"the tool {name_of(self.function)} refuses {shown(values)}: {error}", skip, True)
            refusal.__cause__ = error
            return refusal


def raise_first(outcomes: Sequence[Any], what: str) -> None:
    """Raise the first `ToolError` of a call among what rows came to, with its row. what: a row is called."""
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, ToolError) and not isinstance(outcome, NotCalledError):
            raise outcome.at(f"{what} {row}")


def _stops(outcome: Any) -> bool:
    # A refusal is about its row alone: the tool works, and the other rows are still wanted.
    return isinstance(outcome, ToolError) and not (outcome.skip or outcome.refused)


def _tried(call: Callable[[], T], what: str, retries: int) -> T:
    """What the call returns, in the first of 1 + retries tries that does not raise, or what the last of them raises.

    what: names the call in the log.
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
        retry=tenacity.retry_if_exception_type() & tenacity.retry_if_not_exception_type(RecordError),
        before_sleep=announce,
        reraise=True,
    )
    return retrying(call)


def _within(seconds: float | None, call: Callable[[], T]) -> T:
    """What the call returns, made in a thread of its own if there is a limit. Raises `TimeoutError` past the limit."""
    if seconds is None:
        return call()
    thread = DaemonExecutor(1, "call")
    made = thread.submit(call)
    thread.shutdown(wait=False, cancel_futures=False)
    if not wait([made], seconds).done:
        raise TimeoutError(f"no result within {seconds:g} s")
    return made.result()


def _side_by_side(call: Callable[[T], Any], items: Sequence[T], threads: int) -> list[Any]:
    """What the call returned for the items, so many at a time; one at a time in the caller's own thread.

    After an outcome that stops no further call begins, which leaves `_NOT_CALLED`; those under way are finished.
    """
    ended = threading.Event()

    def outcome_of(item: T) -> Any:
        outcome = _NOT_CALLED if ended.is_set() else call(item)
        if _stops(outcome):
            ended.set()
        return outcome

    if threads == 1:
        return [outcome_of(item) for item in items]
    pool = DaemonExecutor(min(threads, len(items)), "call")
    try:
        return list(pool.map(outcome_of, items))
    finally:
        # After Ctrl-C too: what is under way ends on its own.
        pool.shutdown(wait=False)
