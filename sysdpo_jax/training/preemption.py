"""Being asked to stop, by SIGTERM from a scheduler or Ctrl-C from a person: what a run raises once it has saved."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils

# Seconds that what a run waits for gets to come, once it is asked to stop.
PATIENCE = 2.0


class Preempted(SystemExit):
    """The run was asked to stop and has saved `step` updates. Not caught, it ends the script with exit code 0.

    Args:
        step: How many updates.
        directory: Of the checkpoints.
    """

    def __init__(self, step: int, directory: Path):
        super().__init__(0)
        self.step, self.directory = step, directory

    def __str__(self) -> str:
        return f"asked to stop: step {self.step} is saved in {self.directory}, the same command goes on from there"


class StopNow(BaseException):
    """The block was left because of a signal. Not an `Exception`, nor a `SystemExit`: users' code must not take it."""


class StopRequests:
    """What asks a run to stop: call it after every step.

    Args:
        ask: What to raise once the state of so many updates is saved, None to go on.
    """

    def __init__(self, ask: Callable[[int], BaseException | None]):
        self._ask = ask
        # Whether a block of `waiting` lasts, and when the first signal came.
        self.waits, self.first = False, math.inf

    def __call__(self, step: int) -> BaseException | None:
        return self._ask(step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what may wait for ever on users' code or on a network, and leaves the run's state as it is.

        Raises:
            StopNow: A signal came `PATIENCE` seconds ago. What to raise in the end says a call, as ever.
        """
        self.waits = True
        try:
            if self.overdue():
                raise StopNow
            yield
        finally:
            self.waits = False

    def overdue(self) -> bool:
        """Whether the stop that is asked for has waited long enough."""
        return time.monotonic() - self.first >= PATIENCE


@contextmanager
def _signals(directory: Path) -> Iterator[StopRequests]:
    """SIGTERM and Ctrl-C of this process, while the block lasts."""
    received: list[int] = []
    asked = StopRequests(lambda step: _what_to_raise(received, step, directory))
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    main, ended, ending = threading.get_ident(), False, threading.Lock()

    def ask_again() -> None:
        with ending:
            if not ended:
                # Wakes the main thread, whatever it waits for.
                signal.pthread_kill(main, signal.SIGTERM)

    again = threading.Timer(PATIENCE, ask_again)
    again.daemon = True

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        if len(received) == 1:
            asked.first = time.monotonic()
            again.start()
        elif asked.waits and asked.overdue():
            # Once: what it interrupts may have to clean up.
            asked.waits = False
            raise StopNow

    for kind in before:
        signal.signal(kind, note)
    try:
        yield asked
    finally:
        with ending:
            ended = True
        again.cancel()
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def stop_requests(directory: Path) -> Iterator[StopRequests]:
    """What asks the block to stop, to be called after every step. directory: that of the checkpoints, for the message.

    In one process SIGTERM makes it `Preempted` and the first Ctrl-C `KeyboardInterrupt`; a second Ctrl-C interrupts at
    once. Python hands signals to the main thread alone: in another one nothing is asked. Where jax.distributed runs,
    its preemption service agrees on one step for all processes when any of them gets SIGTERM.
    """
    if jax.distributed.is_initialized():
        yield StopRequests(
            lambda step: Preempted(step, directory) if multihost_utils.reached_preemption_sync_point(step) else None
        )
    elif threading.current_thread() is threading.main_thread():
        with _signals(directory) as asked:
            yield asked
    else:
        yield StopRequests(lambda step: None)


def _what_to_raise(received: list[int], step: int, directory: Path) -> BaseException | None:
    if not received:
        return None
    saved = Preempted(step, directory)
    return saved if received[0] == signal.SIGTERM else KeyboardInterrupt(str(saved))
