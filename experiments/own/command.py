"""What people see of an entry point that cannot go on: one line on standard error, exit code 1."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

import experiments
import sysdpo_jax
from sysdpo_jax import NonFiniteError
from sysdpo_jax.training.checkpoints import CorruptCheckpointError
from sysdpo_jax.training.distributed import leave

OURS = tuple(str(Path(package.__path__[0])) for package in (experiments, sysdpo_jax))

# Seconds that Python and other libraries may take to end their threads, once the command has done its work.
EXIT = 10.0

# Of Orbax, about what is meant: saving before the evaluation has its figure, looking at a run from outside.
EXPECTED = ("Requested `tracked_metric`", "CheckpointManagerOptions.read_only=True", "Given directory is read only")


@contextmanager
def user_errors() -> Iterator[None]:
    """End with a line and code 1 where what the user gave cannot be used, a full disk included; 130 after Ctrl-C.

    What other libraries raise, and we did not expect, is a fault of the program: it shows where it happened.
    """
    logging.getLogger("absl").addFilter(_is_news)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted: what was finished is kept", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            leave(130)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, NonFiniteError, CorruptCheckpointError) as error:
        if isinstance(error, ValueError | ImportError) and not _is_ours(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            leave(1)
        raise SystemExit(1) from None


@contextmanager
def bounded_exit() -> Iterator[None]:
    """Around all that a process does: threads of others, such as a tool's, hold up its end for `EXIT` seconds alone.

    Of several processes the end is JAX's business, which waits for the others.
    """
    code = 1
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        if not jax.distributed.is_initialized():
            threading.Thread(target=_end, args=(code,), daemon=True).start()


def _end(code: int) -> None:
    time.sleep(EXIT)
    print("warning: something in the background does not end and is left alone", file=sys.stderr, flush=True)
    leave(code)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(EXPECTED)


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OURS)
