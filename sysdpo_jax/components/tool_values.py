"""What tools gave, kept in a file as it comes: whatever ends a process, the next one does not ask, or pay, again."""

import base64
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from sysdpo_jax.io import whole_lines
from sysdpo_jax.row_files import pack, unpack
from sysdpo_jax.user_code import name_of
from sysdpo_jax.values import content, is_plain

logger = logging.getLogger(__name__)

FIELDS = {"node", "tool", "key", "value", "blobs"}


class ToolValues:
    """Values by key in JSON Lines at `path`, which need not exist: few of them are in memory.

    A line is written by one call of the system, so that a process that is killed leaves whole lines, or a part of the
    last one, which is passed over. Of several processes of JAX the first writes; the others know what was there before.

    Raises:
        ValueError: The file holds something else: names file and line.
    """

    def __init__(self, path: Path):
        self._path, self._writes, self._lock = path, jax.process_index() == 0, threading.Lock()
        self._starts = dict(_starts(path)) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def __getitem__(self, key: str) -> Any:
        with self._path.open("rb") as file:
            file.seek(self._starts[key])
            line = json.loads(file.readline())
        return unpack(line["value"], lambda number: base64.b64decode(line["blobs"][number]))

    def add(self, node: str, tool: str, key: str, value: Any) -> None:
        """Keep a value. Where the file cannot be written it is told once, and the value is not lost to the caller."""
        blobs: list[Any] = []

        def blob(data: Any) -> int:
            blobs.append(data)
            return len(blobs) - 1

        fields = {"node": node, "tool": tool, "key": key, "value": pack(value, blob)}
        line = json.dumps(fields | {"blobs": [base64.b64encode(blob).decode() for blob in blobs]})
        with self._lock:
            if not self._writes:
                return
            try:
                self._starts[key] = _appended(self._path, line.encode())
            except OSError as error:
                self._writes = False
                logger.warning("%s cannot be written (%s): values of tools are not kept", self._path, error.strerror)


class Kept:
    """The function of a node's tool, which is not called for what the file has; called what the function is called."""

    def __init__(self, node: str, function: Callable[..., Any], values: ToolValues):
        self._node, self._function, self._values = node, function, values
        self._tool = name_of(function)
        module, _, name = self._tool.rpartition(":")
        self.__module__, self.__qualname__ = module, name

    def __call__(self, *parents: Any) -> Any:
        key = self._key(parents)
        if key is not None and key in self._values:
            return self._values[key]
        value = self._function(*parents)
        if key is not None and is_plain(value):
            self._values.add(self._node, self._tool, key, value)
        return value

    def _key(self, parents: tuple[Any, ...]) -> str | None:
        """Of node, tool and parents' values, the same in every process; None where there is no such key."""
        about = (*_arguments(self._function), *parents)
        if not _is_stable(about):
            return None
        text = repr((self._node, self._tool, content(about)))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _starts(path: Path) -> Iterator[tuple[str, int]]:
    """(key, where its line starts, in bytes)."""
    for number, (start, line) in enumerate(whole_lines(path), 1):
        try:
            fields = json.loads(line)
        except ValueError:
            # What a killed process or a full disk left of a line.
            continue
        if not isinstance(fields, dict) or set(fields) != FIELDS:
            raise ValueError(f"{path}, line {number} is no value of a tool: name another file for them")
        yield fields["key"], start


def _appended(path: Path, line: bytes) -> int:
    """Add a line; where it starts, in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        # A part of a line ends here.
        begun = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        whole = b"\n" * begun + line + b"\n"
        written = file.write(whole)
        while written < len(whole):
            written += file.write(whole[written:])
        # The end of what this call wrote, also beside another process.
        return file.tell() - len(line) - 1


def _arguments(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Those that are bound to the function, which its name does not say."""
    if not isinstance(function, functools.partial):
        return ()
    return (list(function.args), dict(function.keywords), *_arguments(function.func))


def _is_stable(value: Any) -> bool:
    """Whether `content` of the value has the same text in every process."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_stable(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_stable, value))
    if isinstance(value, np.ndarray | np.generic):
        return not value.dtype.hasobject
    return value is None or isinstance(value, str | int | float | bytes | PurePath)
