"""What a run writes beside its rows: for TensorBoard, for Weights & Biases, and a profile.

Each ends with a warning where it fails; training goes on.
"""

import itertools
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from sysdpo_jax.io import write_whole
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.training.progress import tell

# Of the files of this process: two may be made within a second.
_NUMBERS = itertools.count()
# Seconds after which what TensorBoard may show is on disk.
FLUSH_EVERY = 30.0
# Seconds that Weights & Biases may take, when training has ended, to send what is left.
FINISH = 10.0


class Events:
    """Scalars and texts in an events file of TensorBoard below `directory`, written in this thread.

    tensorboardX's own `SummaryWriter` writes in another one behind a bounded queue: where that thread dies, on a full
    disk, whoever writes next waits for ever. Here an error of the disk is met where it happens: the first one is told
    as a warning, and nothing more is written.

    Args:
        directory: Where the file is made.
        purge: The step from which on TensorBoard hides what earlier files hold.
    """

    def __init__(self, directory: Path, purge: int):
        # Imported late: tensorboardX imports torch where it is installed, and `import sysdpo_jax` must not.
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._directory, self._flushed, self._failed = directory, time.monotonic(), False
        self._writer: Any = None
        self._writer = self._tried(lambda: RecordWriter(str(directory / name)))
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """`{name: value}` of a step."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """A text of a step."""
        from tensorboardX.summary import text as summary

        self._write(step=step, summary=summary(name, text))

    def flush(self) -> None:
        """Return once all is on disk."""
        self._flushed = time.monotonic()
        self._tried(lambda: self._writer.flush())

    def close(self) -> None:
        """Put all on disk, and close the file."""
        self.flush()
        self._tried(lambda: self._writer.close())

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._tried(lambda: self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString()))

    def _tried(self, call: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return call()
        except OSError as error:
            self._failed = True
            tell(
                f"warning: {self._directory}: TensorBoard's events cannot be written ({error}) and end here; "
                "metrics.jsonl goes on"
            )
            # What it holds in its buffer it tries to write once more.
            with suppress(OSError):
                if self._writer is not None:
                    self._writer.close()
            return None


def import_wandb() -> Any:
    """The module. Raises `ImportError` with the remedy where it is absent."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "Weights & Biases was asked for, but wandb is not installed: pip install wandb, or leave it out"
        ) from error
    return wandb


class Tracker:
    """A run of Weights & Biases, the same one whenever the directory's run goes on.

    One thread talks to it, so that neither a network that is away nor a service that hangs holds up a step; the first
    failure is told as a warning, and no more is sent.

    Args:
        directory: Of the run; the file wandb-id keeps the run's name there.
        settings: What wandb.init takes.

    Raises:
        ImportError: wandb is absent.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self._wandb = import_wandb()
        self._run: Any = None
        name = directory / "wandb-id"
        if not name.exists():
            write_whole(name, uuid.uuid4().hex[:12])
        own = {"dir": str(directory), "id": name.read_text(encoding="utf-8"), "resume": "allow"}
        self._failed = False
        self._thread = DaemonExecutor(1, "wandb")
        self._send(lambda: self._start({**own, **settings}))

    def log(self, row: Mapping[str, float | int]) -> None:
        """Send a row, later."""
        self._send(lambda: self._run.log(row))

    def finish(self, exit_code: int) -> None:
        """End the run there, once all rows are sent; give up after `FINISH` seconds, with a warning."""
        try:
            self._send(lambda: self._run.finish(exit_code=exit_code)).result(FINISH)
        except TimeoutError:
            self._warn(f"it did not take all rows within {FINISH:.0f} seconds of the end")
        else:
            self._thread.shutdown()

    def _start(self, settings: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(**settings)
        # Steps are a metric of their own: wandb's own count takes no row of a step before its last one.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _send(self, call: Callable[[], object]) -> Future[None]:
        def tried() -> None:
            if self._failed:
                return
            try:
                call()
            except (Exception, SystemExit) as error:
                self._warn(f"{type(error).__name__}: {error}")

        return self._thread.submit(tried)

    def _warn(self, what: str) -> None:
        if self._failed:
            return
        self._failed = True
        tell(f"warning: Weights & Biases gets no more of this run ({' '.join(what.split())}); metrics.jsonl goes on")


class Profile:
    """Traces the steps [first, last) with jax.profiler; a trace that cannot be written costs a warning."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._running = steps or (0, 0), directory, False

    def before(self, step: int) -> None:
        first, last = self._steps
        if not self._running and first <= step < last:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: PyTree) -> None:
        if self._running and step + 1 == self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            tell(f"warning: the trace of the steps is not written to {self._directory}: {error}")
