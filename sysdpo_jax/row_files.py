"""Files of rows: any of them is found by its number, few are in memory, and equal arrays are stored once.

A row is made of what JSON has, sampled texts, bytes, arrays and tuples. A file is two Arrow files, of the rows as texts
in JSON and of what JSON cannot hold, its leaves; both are written whole or not at all, and read memory-mapped.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.io import reading, replacing
from sysdpo_jax.values import from_json, to_json

# Rows and bytes that wait in memory to be written together. A file of many small parts is slow to open.
TOGETHER, BYTES_TOGETHER = 1024, 2**26
# What stands in JSON for bytes and arrays, with their number, and for a tuple.
BYTES, ARRAY, TUPLE = "\0bytes", "\0array", "\0tuple"
# Types of JSON's own; most values of a row are of one of them.
AS_THEY_ARE = (str, int, float, bool, type(None))
# Longer leaves are known by a digest.
SHORT = 32
# The two files' names.
ROWS, LEAVES = ".rows.arrow", ".leaves.arrow"


def pack(value: Any, leaf: Callable[[bytes | np.ndarray], int]) -> Any:
    """The value as JSON has it. leaf: takes bytes and arrays away, and says the number that stands for them.

    Raises `TypeError` for an array that holds no numbers.
    """
    if type(value) in AS_THEY_ARE:
        return value
    if isinstance(value, bytes):
        return {BYTES: leaf(value)}
    if isinstance(value, np.str_):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return {ARRAY: leaf(_plain(np.asarray(value)))}
    if isinstance(value, Mapping):
        return {name: pack(item, leaf) for name, item in value.items()}
    if isinstance(value, list | tuple):
        packed = [pack(item, leaf) for item in value]
        return packed if isinstance(value, list) else {TUPLE: packed}
    return to_json(value)


def unpack(value: Any, leaf: Callable[[int], Any]) -> Any:
    """What `pack` was given. leaf: gives the bytes or the array of a number."""
    if isinstance(value, list):
        return [unpack(item, leaf) for item in value]
    if not isinstance(value, dict):
        return value
    for mark in (BYTES, ARRAY):
        if mark in value:
            return leaf(value[mark])
    if TUPLE in value:
        return tuple(unpack(value[TUPLE], leaf))
    return from_json({name: unpack(item, leaf) for name, item in value.items()})


def write_row_file(path: Path, rows: Iterable[Any]) -> int:
    """Write a file of these rows at `path`, to whose name endings are added; how many there were.

    Raises `TypeError` for a value that no file can hold.
    """
    # Imported late: it takes a moment.
    import pyarrow as pa

    row_type = pa.schema([("row", pa.large_string())])
    leaf_type = pa.schema([("data", pa.large_binary()), ("type", pa.string()), ("shape", pa.list_(pa.int64()))])
    number = 0
    # The rows end last: where they are, the leaves are too.
    with (
        replacing(path.with_name(f"{path.name}{ROWS}")) as row_path,
        replacing(path.with_name(f"{path.name}{LEAVES}")) as leaf_path,
        pa.OSFile(str(row_path), "wb") as row_sink,
        pa.OSFile(str(leaf_path), "wb") as leaf_sink,
        pa.ipc.new_file(row_sink, row_type) as row_writer,
        pa.ipc.new_file(leaf_sink, leaf_type) as leaf_writer,
    ):
        texts, leaves = _Waiting(row_writer, row_type), _Waiting(leaf_writer, leaf_type)
        numbers: dict[Any, int] = {}

        def leaf(value: bytes | np.ndarray) -> int:
            kind, shape = (None, ()) if isinstance(value, bytes) else (value.dtype, value.shape)
            data = value if isinstance(value, bytes) else value.tobytes()
            key = kind, shape, data if len(data) <= SHORT else hashlib.blake2b(data, digest_size=16).digest()
            if key not in numbers:
                numbers[key] = len(numbers)
                leaves.add(
                    {"data": data, "type": "bytes" if kind is None else kind.name, "shape": list(shape)}, len(data)
                )
            return numbers[key]

        for row in rows:
            text = json.dumps(pack(row, leaf))
            texts.add({"row": text}, len(text))
            number += 1
        texts.write()
        leaves.write()
    return number


def _plain(array: np.ndarray) -> np.ndarray:
    """The array with bytes in this machine's order, which the name of its type says nothing of."""
    if array.dtype.kind not in "biufcV" or array.dtype.names is not None:
        raise TypeError(f"an array of type {array.dtype} cannot be kept in a file: give numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class _Waiting:
    """Rows of a table that are written together."""

    def __init__(self, writer: Any, schema: Any):
        self._writer, self._schema, self._rows, self._bytes = writer, schema, list[dict[str, Any]](), 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._rows.append(row)
        self._bytes += size
        if len(self._rows) >= TOGETHER or self._bytes > BYTES_TOGETHER:
            self.write()

    def write(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


class RowFile:
    """The rows of a file that `write_row_file` made. Arrays are read-only, and lie in the mapped file.

    Args:
        path: As it was given to `write_row_file`.
        remedy: What to do about a damaged one, for the message.

    Raises:
        DamagedFileError: The files are not whole, which reading a row may find out too.
    """

    def __init__(self, path: Path, remedy: str = "restore it"):
        self._path, self._remedy = path, remedy
        self._rows, self._leaves = (self._mapped(path.with_name(f"{path.name}{ending}")) for ending in (ROWS, LEAVES))

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, row: int) -> Any:
        return self.entry(row)

    def entry(self, row: int, *names: str) -> Any:
        """One entry of a row that is an object, by the names that lead to it; of the others nothing is read."""
        with reading(self._path, self._remedy):
            packed = json.loads(self._rows["row"][row].as_py())
            for name in names:
                packed = packed[name]
            return unpack(packed, self._leaf)

    def _mapped(self, path: Path) -> Any:
        import pyarrow as pa

        with reading(path, self._remedy), pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()

    def _leaf(self, number: int) -> Any:
        data, kind = self._leaves["data"][number].as_buffer(), self._leaves["type"][number].as_py()
        if kind == "bytes":
            return data.to_pybytes()
        array = np.frombuffer(data, np.dtype(kind)).reshape(self._leaves["shape"][number].as_py())
        array.flags.writeable = False
        return array
