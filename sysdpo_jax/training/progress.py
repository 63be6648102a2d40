"""Progress with time left: bars on a terminal, plain lines elsewhere, both on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
# `with progress(start, steps) as report: report(steps done, text)`
ProgressFactory = Callable[[int, int], AbstractContextManager[Report]]

# Seconds between two plain lines.
LINE_EVERY = 10.0


def tell(text: str) -> None:
    """A line on standard error, which may be a file on a full disk or a terminal that is gone: that stops no run."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Board:
    """Bars of phases, which may run in several threads at once. A context manager."""

    def __init__(self) -> None:
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._terminal = self._bars.console.is_terminal

    def __enter__(self) -> "Board":
        if self._terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        # It writes to standard error, see `tell`.
        with suppress(OSError):
            self._bars.stop()

    @contextmanager
    def phase(self, label: str, start: int, steps: int) -> Iterator[Report]:
        """A bar that stays until the block ends.

        Args:
            label: In front of it.
            start: Where it begins.
            steps: Where it ends.

        Yields:
            `report(steps done, text)`, which moves it.
        """
        if not self._terminal:
            yield Lines(label, start, steps).report
            return
        task = self._bars.add_task(label, total=steps, completed=start, note="")
        try:
            yield lambda done, text: self._bars.update(task, completed=done, note=text)
        finally:
            self._bars.remove_task(task)


@contextmanager
def progress(start: int, steps: int) -> Iterator[Report]:
    """A single bar, until the block ends.

    Args:
        start: Where the run begins.
        steps: Where it ends.

    Yields:
        `report(steps done, text)`, which moves it.
    """
    with Board() as board, board.phase("step", start, steps) as report:
        yield report


class Lines:
    """Plain lines, ten seconds apart at least, and one at the end: `report(steps done, text)`."""

    def __init__(self, label: str, start: int, steps: int):
        self._label, self._start, self._steps = label, start, steps
        self._last = time.monotonic()
        # The first report: what came before it compiled, and says nothing of the speed.
        self._first: tuple[int, float] | None = None

    def report(self, done: int, text: str) -> None:
        now = time.monotonic()
        if self._first is None and done > self._start:
            self._first = done, now
        if now - self._last < LINE_EVERY and done < self._steps:
            return
        self._last = now
        tell(f"{self._label} {done}/{self._steps}  {text}  {self._left(done, now)}")

    def _left(self, done: int, now: float) -> str:
        if done >= self._steps or self._first is None or done == self._first[0]:
            return "done" if done >= self._steps else ""
        number, began = self._first
        minutes, rest = divmod(round((now - began) / (done - number) * (self._steps - done)), 60)
        return f"{minutes}:{rest:02d} left"
