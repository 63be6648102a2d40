"""TensorBoard's events of a run: a side output, which ends with a warning where it cannot be written."""

import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sysdpo_jax.training.progress import tell

# Of the files of this process: two may be made within a second.
_NUMBERS = itertools.count()
# Seconds after which what TensorBoard may show is on disk.
FLUSH_EVERY = 30.0


class Events:
    """Scalars and texts in an events file below `directory`, written in this thread.

    tensorboardX's own `SummaryWriter` writes in another one behind a bounded queue: where that thread dies, on a full
    disk, whoever writes next waits for ever. Here an error of the disk is met where it happens: the first one is told
    as a warning, and nothing more is written.

    Args:
        directory: Where the file is made.
        purge: The step from which on TensorBoard hides what earlier files hold.
    """

    def __init__(self, directory: Path, purge: int):
        # Imported late: tensorboardX imports torch where it is installed, and `import sysdpo_jax` must not.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._directory = directory
        self._writer: Any = None
        self._flushed = time.monotonic()
        try:
            self._writer = RecordWriter(str(directory / name))
        except OSError as error:
            self._drop(error)
        self._write(Event(file_version="brain.Event:2", wall_time=time.time()))
        self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """`{name: value}` of a step."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._summary(scalar(name, value), step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text of a step."""
        from tensorboardX.summary import text as summary

        self._summary(summary(name, text), step)

    def flush(self) -> None:
        """Return once all is on disk."""
        self._flushed = time.monotonic()
        self._tried(lambda: self._writer.flush())

    def close(self) -> None:
        """Put all on disk, and close the file."""
        self.flush()
        self._tried(lambda: self._writer.close())

    def _summary(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._write(Event(summary=summary, step=step, wall_time=time.time()))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self.flush()

    def _write(self, event: Any) -> None:
        self._tried(lambda: self._writer.write(event.SerializeToString()))

    def _tried(self, write: Callable[[], object]) -> None:
        if self._writer is None:
            return
        try:
            write()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        tell(
            f"warning: {self._directory}: TensorBoard's events cannot be written ({error}) and end here; metrics.jsonl "
            "goes on"
        )
        writer, self._writer = self._writer, None
        if writer is not None:
            # What it holds in its buffer it tries to write once more.
            with suppress(OSError):
                writer.close()
