"""Files of our own, written whole or not at all.

What is written whole has another name until all of it is on disk, `<name>.partial`. Whatever ends the process, or the
machine, leaves what was there before or what is there afterwards. A partial one is never read, and whoever writes that
file or folder next removes it.

Who may write: one process at a time in the folder of a run, or on an output file. The kernel holds the lock, so that
of a process that died, by whatever signal, is free at once. Beside it a small JSON file says who has it. Both are gone
once the holder leaves; of one that was killed they stay, and the next holder takes them over.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from sysdpo_jax.errors import ConfigError, DamagedFileError

# Seconds that a holder who is just leaving may take.
PATIENCE = 1.0


class InUseError(OSError):
    """A folder or file cannot be had for writing: the message names it, who has it, and the remedy."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path at which a file or a folder is made, which takes the place of `path` when the block ends well.

    Of a block that fails nothing is left. A folder takes the place of an empty one alone.
    """
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        for made in (partial, *(partial.rglob("*") if partial.is_dir() else ())):
            _put_on_disk(made)
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise
    with suppress(OSError):
        # The new name; not every file system can be told to keep it.
        _put_on_disk(path.parent)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a text, as UTF-8, or bytes."""
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write a value."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a line for each of the rows."""
    write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_text(path: Path, name: str, remedy: str) -> str:
    """What a user's file says. name: of it, for errors. Raises `ConfigError` for a file that is no UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist: {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text ({error.reason}): convert it") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}): {remedy}") from None


def read_json(path: Path, remedy: str = "restore it, or remove it") -> Any:
    """What `write_json` wrote. Raises `DamagedFileError` for what is no JSON, and `FileNotFoundError`."""
    text = path.read_bytes()
    with reading(path, remedy):
        return json.loads(text)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays of numbers and texts, as a compressed NPZ file, which cannot hold code."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, remedy: str = "restore it, or remove it") -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises `DamagedFileError`."""
    with reading(path, remedy), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Whatever reading a file of our own comes to, as a `DamagedFileError` with its path and the remedy."""
    try:
        yield
    except (DamagedFileError, MemoryError):
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DamagedFileError(f"{path} is damaged or incomplete ({said[:200]}): {remedy}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of what the file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_whole(file: FileIO, data: bytes) -> None:
    """Write at the end of a file without a buffer. Where that fails the file is as it was: a full disk takes a part."""
    end = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) or 0 :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(where it starts, in bytes; the line) of all lines that end; of a killed process the last one may not."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def note_of(path: Path) -> Path:
    """Where it is said how the file at `path` was made."""
    return path.with_name(f"{path.name}.json")


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


def _put_on_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def user_cache() -> Path:
    """The user's folder for what can be made again, $XDG_CACHE_HOME/sysdpo_jax, ~/.cache/sysdpo_jax by default.

    Raises `RuntimeError` for a user without a home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sysdpo_jax"
