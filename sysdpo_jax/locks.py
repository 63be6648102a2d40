"""Who may write: one process at a time in the folder of a run, or on an output file.

The kernel holds the lock, so that of a process that died, by whatever signal, is free at once. Beside it a small JSON
file says who has it. Both are gone once the holder leaves; of one that was killed they stay, and the next holder takes
them over.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sysdpo_jax.io import read_json, write_json

# Seconds that a holder who is just leaving may take.
PATIENCE = 1.0


class InUseError(OSError):
    """A folder or file cannot be had for writing: the message names it, who has it, and the remedy."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """The folder of a run is this thread's for the block; the same thread may ask for it again inside.

    It is made where it is missing, and removed with what was made above it where the block leaves nothing in it.

    Args:
        folder: Of the run. The lock is its file `.lock`.

    Raises:
        InUseError: Another process or thread has it, or it cannot be locked.
    """
    with _made(folder), _locked(folder / ".lock", folder, "directory"):
        yield


@contextmanager
def locked_file(path: Path, wait: bool = False) -> Iterator[None]:
    """An output file is this thread's for the block, as `locked_folder`; it need not exist.

    Args:
        path: Of the file. The lock is `.<name>.lock` beside it.
        wait: Until another process or thread that has it is done.

    Raises:
        InUseError: Another process or thread has it, or it cannot be locked.
    """
    with _made(path.parent), _locked(path.with_name(f".{path.name}.lock"), path, "output", wait):
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder exists in the block; what had to be made for it and is empty in the end goes again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InUseError(f"{folder} is a file: choose another directory") from None
    except OSError as error:
        raise InUseError(f"{folder} cannot be made ({error.strerror}): choose a directory that you may write") from None
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _locked(path: Path, what: Path, kind: str, wait: bool = False) -> Iterator[None]:
    about = path.with_name(f"{path.name}.json")
    # One lock object of a thread for a path: it counts how often it is taken, and another thread has one of its own.
    lock = FileLock(path.absolute(), is_singleton=True)
    with ExitStack() as stack:
        try:
            lock.acquire(timeout=-1 if wait else PATIENCE)
        except Timeout:
            raise InUseError(f"{what} is in use by {_holder(about)}: wait for it or choose another {kind}") from None
        except OSError as error:
            raise InUseError(
                f"{what} cannot be locked ({error.strerror or error}): choose another {kind}, which you may write and "
                "whose file system has locks"
            ) from None
        stack.callback(lock.release)
        if lock.lock_counter == 1:
            # Before the lock is given back: who opened the file meanwhile sees that it is gone (filelock since 3.21
            # looks at its number of links), and makes a new one.
            stack.callback(path.unlink, missing_ok=True)
            stack.callback(about.unlink, missing_ok=True)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            write_json(about, holder)
        yield


def _holder(about: Path) -> str:
    try:
        holder = read_json(about)
        return f"process {holder['process']} on host {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It took the lock this moment.
        return "another process"
