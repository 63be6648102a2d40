"""Rows of data sets: JSON Lines, Parquet, or whatever `datasets` finds in a folder or on the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sysdpo_jax.components.base import RecordError

LINES, TABLE = (".jsonl", ".ndjson"), (".parquet",)


class Row(NamedTuple):
    """number: counted from 1, of a line in JSON Lines. values: the row, or why it cannot be read."""

    number: int
    values: dict[str, Any] | RecordError


def read_rows(source: str | Path, split: str = "train") -> Iterator[Row]:
    """The rows one after the other; of a large file only a few are in memory at a time.

    source: a .jsonl or .parquet file, or what `datasets.load_dataset` takes, of which `split` is streamed.
    Raises `FileNotFoundError` where there is nothing of that name, `RecordError` for a file of another kind or one that
    cannot be read on.
    """
    path = Path(source)
    if path.is_file() and path.suffix in LINES:
        return json_lines(path)
    if path.is_file() and path.suffix not in TABLE:
        raise RecordError(f"{path}: only {', '.join((*LINES, *TABLE))} files are read: convert it")
    if path.suffix in (*LINES, *TABLE) and not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the file of the records")
    return _streamed(path if path.exists() else str(source), split)


def json_lines(path: Path) -> Iterator[Row]:
    """The rows of JSON Lines; empty lines are skipped. Raises `RecordError` for a file that is no UTF-8 text."""
    # Text mode would also take JSON's own U+2028 for the end of a line if it were split afterwards.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(number, _parsed(line))
        except UnicodeDecodeError as error:
            raise RecordError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None


def _parsed(line: str) -> dict[str, Any] | RecordError:
    try:
        values = json.loads(line, object_pairs_hook=_named_once)
        if "\\ud" in line.lower():
            # JSON can spell half of such a pair; no tokenizer takes it.
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("ascii", "backslashreplace").decode()
        return RecordError(f"holds {half}, half a character: write the text anew, or drop the row")
    except RecordError as error:
        return error
    except (ValueError, RecursionError) as error:
        return RecordError(f"not valid JSON ({error}); write one object a line")
    if not isinstance(values, dict):
        return RecordError(f"{type(values).__name__} instead of an object: write one object a line")
    return values


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose parser would keep the last of equal names."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"the field {twice!r} stands twice in one object: keep one of them")
    return values


def _streamed(source: Path | str, split: str) -> Iterator[Row]:
    # Imported late: it takes a second.
    import datasets
    import pyarrow

    table = isinstance(source, Path) and source.is_file()
    try:
        found: Any = (
            datasets.load_dataset("parquet", data_files=str(source), split="train", streaming=True)
            if table
            else datasets.load_dataset(str(source), split=split, streaming=True)
        )
        # Images stay the bytes that they are.
        for number, values in enumerate(found.decode(False), 1):
            yield Row(number, _plain(values))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(
            f"{source} cannot be read as a data set ({reason}): fetch it again, or check its name"
        ) from error


def _plain(value: Any) -> Any:
    """A table's value with what JSON Lines would have: no names without a value, bytes for images, texts for dates."""
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bytes | bool | int | float) else str(value)
