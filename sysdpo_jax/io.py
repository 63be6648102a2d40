"""Files of our own: written whole or not at all, and lines that the same command goes on with after a stop.

What is written whole has another name until all of it is on disk, `<name>.partial`. Whatever ends the process, or the
machine, leaves what was there before or what is there afterwards. A partial one is never read, and whoever writes that
file or folder next removes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.errors import ConfigError, DamagedFileError
from sysdpo_jax.manifest import check_same


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


@dataclass(frozen=True)
class ResumableJsonl:
    """JSON Lines at `path`, with `about`, how they are made, in `<path>.json` beside them.

    What a killed process left of a last line is cut off.

    Raises:
        ConfigError: The file is there and was made in another way: names what differs.
    """

    path: Path
    about: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        note = note_of(self.path)
        if not note.exists():
            raise ConfigError(f"{self.path} exists, and nothing says how it was made: name another output")
        check_same(str(self.path), read_json(note), self.about, f"name another output, or give what {note} says")
        self.cut(self.count())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add whole lines, on disk when this returns."""
        if not self.path.exists():
            write_json(note_of(self.path), self.about)
        with self.path.open("ab", buffering=0) as file:
            append_whole(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
            os.fsync(file.fileno())

    def count(self) -> int:
        """The whole lines."""
        return len(self._ends()) - 1

    def cut(self, number: int) -> None:
        """Drop what follows the first `number` lines."""
        if self.path.exists():
            os.truncate(self.path, self._ends()[number])

    def _ends(self) -> list[int]:
        """Where the first 0, 1, 2 ... whole lines end, in bytes."""
        lines = whole_lines(self.path) if self.path.exists() else ()
        return [0, *(start + len(line) for start, line in lines)]


def note_of(path: Path) -> Path:
    """Where it is said how the file at `path` was made."""
    return path.with_name(f"{path.name}.json")


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
