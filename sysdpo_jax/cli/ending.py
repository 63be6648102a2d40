"""What people see of an entry point that cannot go on: one line on standard error, exit code 1."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax

import sysdpo_jax
from sysdpo_jax import NonFiniteError
from sysdpo_jax.parallel.distributed import leave
from sysdpo_jax.training.checkpoints import CorruptCheckpointError

OURS = str(Path(sysdpo_jax.__path__[0]))

# Seconds that Python and other libraries may take to end their threads, once the command has done its work.
EXIT = 10.0

# Seconds after a SIGTERM in which another one is of the same request: some senders reach a process twice.
SAME = 2.0


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a stop like Ctrl-C, which users' code lets through. code: what the process exits with."""

    def __init__(self, code: int = 128 + signal.SIGTERM):
        super().__init__("stopped by SIGTERM: what was finished is kept")
        self.code = code


@contextmanager
def user_errors() -> Iterator[None]:
    """End with a line and code 1 where what the user gave cannot be used, a full disk included.

    After Ctrl-C the code is 130, after SIGTERM that of `Terminated`; locks and half-made things are gone then.
    What other libraries raise, and we did not expect, is a fault of the program: it shows where it happened.
    """
    try:
        with _terminable():
            yield
        return
    except BrokenPipeError:
        # Who read the output wants no more of it, and neither does Python's own flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:
        said = str(stop) or "interrupted: what was finished is kept"
        code = stop.code if isinstance(stop, Terminated) else 130
    except (ValueError, OSError, ImportError, NonFiniteError, CorruptCheckpointError) as error:
        if isinstance(error, ValueError | ImportError) and not _is_ours(error):
            raise
        said, code = f"error: {' '.join(str(error).split())}", 1
    print(said, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        leave(code)
    raise SystemExit(code)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block; `Trainer.fit` has handlers of its own inside, and gives this one back.

    Of several processes JAX's preemption service has the signal, and in another than the main thread nobody.
    """
    if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = -SAME

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal taken
        if time.monotonic() - taken >= SAME:
            taken = time.monotonic()
            raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
            # The work is done, and its code is known: a SIGTERM that comes again on the way out must not change it.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            threading.Thread(target=_end, args=(code,), daemon=True).start()


def _end(code: int) -> None:
    time.sleep(EXIT)
    print("warning: something in the background does not end and is left alone", file=sys.stderr, flush=True)
    leave(code)


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OURS)
