"""Waiting for many things at a time."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
