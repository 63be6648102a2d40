"""Progress with time left: a bar on a terminal, plain lines elsewhere, both on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, str], None]

# Seconds between two plain lines.
LINE_EVERY = 10.0


@contextmanager
def progress(start: int, steps: int) -> Iterator[Report]:
    """`report(steps done, text)` of a run that goes from `start` to `steps`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(start, steps).report
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=steps, completed=start)
        yield lambda done, text: bar.update(task, completed=done, description=text)


class _Lines:
    def __init__(self, start: int, steps: int):
        self._first, self._steps = start, steps
        self._began = self._last = time.monotonic()

    def report(self, done: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY and done < self._steps:
            return
        self._last = now
        seconds = (now - self._began) / max(done - self._first, 1)
        minutes, rest = divmod(round(seconds * (self._steps - done)), 60)
        print(f"step {done}/{self._steps}  {text}  {minutes}:{rest:02d} left", file=sys.stderr, flush=True)
