"""Being asked to stop, by SIGTERM from a scheduler or Ctrl-C from a person: what a run raises once it has saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils

# `asked(step)`: what to raise once the state of `step` updates is saved, None to go on.
Asked = Callable[[int], BaseException | None]


class Preempted(SystemExit):
    """The run was asked to stop and has saved `step` updates. Not caught, it ends the script with exit code 0."""

    def __init__(self, step: int, directory: Path):
        super().__init__(0)
        self.step, self.directory = step, directory

    def __str__(self) -> str:
        return f"asked to stop: step {self.step} is saved in {self.directory}, the same command goes on from there"


@contextmanager
def stop_requests(directory: Path) -> Iterator[Asked]:
    """What asks the block to stop, to be called after every step. directory: that of the checkpoints, for the message.

    In one process SIGTERM makes it `Preempted` and the first Ctrl-C `KeyboardInterrupt`; a second Ctrl-C interrupts at
    once. Python hands signals to the main thread alone: in another one nothing is asked. Where jax.distributed runs,
    its preemption service agrees on one step for all processes when any of them gets SIGTERM.
    """
    if jax.distributed.is_initialized():
        yield lambda step: Preempted(step, directory) if multihost_utils.reached_preemption_sync_point(step) else None
    elif threading.current_thread() is threading.main_thread():
        with _signals() as received:
            yield lambda step: _what_to_raise(received, step, directory)
    else:
        yield lambda step: None


@contextmanager
def _signals() -> Iterator[list[int]]:
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _what_to_raise(received: list[int], step: int, directory: Path) -> BaseException | None:
    if not received:
        return None
    saved = Preempted(step, directory)
    return saved if received[0] == signal.SIGTERM else KeyboardInterrupt(str(saved))
