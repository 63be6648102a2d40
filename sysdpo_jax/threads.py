"""Threads that hold up nobody: what waits for one can be interrupted, and the process ends without it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Seconds that calls which are going on get to finish before they are left alone.
GRACE = 2.0


class DaemonExecutor(Executor):
    """An executor as those of `concurrent.futures`, except that a call which hangs does not hang the process.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when a block is left and again when the interpreter ends,
    for ever where one of them waits for something that never comes.

    Args:
        threads: How many calls go on at a time.
        name: Of the threads, with a number behind it.
    """

    def __init__(self, threads: int, name: str):
        self._closed = False
        self._calls: SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The future of a call, as that of every executor. Raises `RuntimeError` after `shutdown`."""
        if self._closed:
            raise RuntimeError("this executor is shut down: make a new one")
        future: Future[T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))  # type: ignore[arg-type]
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Cancel what has not begun and, where `wait` says so, wait for the rest, `GRACE` seconds at most."""
        self._closed = True
        while cancel_futures:
            try:
                call = self._calls.get_nowait()
            except Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + (GRACE if wait else 0.0)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(calls: "SimpleQueue[tuple[Future[object], Callable[[], object]] | None]") -> None:
    while (call := calls.get()) is not None:
        future, function = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function())
        except BaseException as error:
            # Whatever it is, it belongs to who asks for the result.
            future.set_exception(error)
        # A thread that waits for the next call keeps nothing of the last one alive.
        del call, future, function
