"""Files of rows: JSON Lines, Parquet, or whatever `datasets` finds in a folder or on the hub; writing preferences."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import MESSAGES
from sysdpo_jax.components.images import as_png
from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.io import file_digest, locked_file, read_json, replacing, write_json, write_whole
from sysdpo_jax.values import SampledText, from_json, to_json

LINES, TABLE, ARRAY = (".jsonl", ".ndjson"), (".parquet",), (".json",)
# Whatever is read as a file of rows.
ROW_FILES = (*LINES, *TABLE, *ARRAY)


class Row(NamedTuple):
    """number: counted from 1, of a line in JSON Lines. values: the row, or why it cannot be read."""

    number: int
    values: dict[str, Any] | RecordError


def source_digest(source: str | Path, split: str = "train") -> str:
    """A hash of what `read_rows` reads: of a file its bytes, of a folder its files' names, sizes and times, of a data
    set on the hub its revision.

    Raises as `read_rows`.
    """
    path = _checked(source)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        about = [(str(file.relative_to(path)), *file_state(file)) for file in files]
    else:
        # Imported late: it takes a second.
        import datasets

        with _reading(source):
            about = [datasets.load_dataset_builder(str(source)).hash]
    return hashlib.sha256(repr((about, split)).encode()).hexdigest()


def known_digest(source: str | Path, split: str, cache: Path) -> str:
    """`source_digest`; a file that has not been touched since the last time is not read again."""
    path, noted = Path(source), cache / "digests.json"
    if not path.is_file():
        return source_digest(source, split)
    state, name = list(file_state(path)), str(path.resolve())
    known = read_json(noted).get(name) if noted.exists() else None
    if known is not None and known[0] == state:
        return str(known[1])
    digest = source_digest(source, split)
    if jax.process_index() == 0:
        # Runs that begin together may share the folder.
        with locked_file(noted, wait=True):
            write_json(noted, (read_json(noted) if noted.exists() else {}) | {name: [state, digest]})
    return digest


def file_state(path: str | Path) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds) of a file, (-1, -1) where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def read_rows(source: str | Path, split: str = "train") -> Iterator[Row]:
    """The rows one after the other; of a large file only a few are in memory at a time.

    source: a .jsonl or .parquet file, a .json file of one list, which is read at once, or what `datasets.load_dataset`
    takes, of which `split` is streamed.
    Raises `FileNotFoundError` where there is nothing of that name, `RecordError` for a file of another kind or one that
    cannot be read on.
    """
    path = _checked(source)
    if path.is_file() and path.suffix in LINES:
        return json_lines(path)
    if path.is_file() and path.suffix in ARRAY:
        return _array(path)
    return _streamed(path if path.exists() else str(source), split)


def _checked(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file() and path.suffix not in ROW_FILES:
        raise RecordError(f"{path}: only {', '.join(ROW_FILES)} files are read: convert it")
    if path.suffix in ROW_FILES and not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the file of the records")
    return path


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


def _array(path: Path) -> Iterator[Row]:
    """The rows of one list of JSON, as other programs export them. Raises `RecordError` for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not valid JSON ({error}): export it again") from None
    if not isinstance(rows, list):
        raise RecordError(f"{path} holds {type(rows).__name__} instead of a list of objects: write JSON Lines")
    for number, row in enumerate(rows, 1):
        yield Row(number, row if isinstance(row, dict) else RecordError(f"{type(row).__name__} instead of an object"))


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

    table = isinstance(source, Path) and source.is_file()
    with _reading(source):
        found: Any = (
            datasets.load_dataset("parquet", data_files=str(source), split="train", streaming=True)
            if table
            else datasets.load_dataset(str(source), split=split, streaming=True)
        )
        # Images stay the bytes that they are.
        for number, values in enumerate(found.decode(False), 1):
            yield Row(number, _plain(values))


@contextmanager
def _reading(source: Path | str) -> Iterator[None]:
    import datasets
    import pyarrow

    try:
        yield
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


def save_preferences(path: str | Path, records: Sequence[PreferenceRecord]) -> None:
    """Write records that `load_preferences` reads back, whole or not at all.

    Arrays of other shapes than images become lists. Texts that a model sampled keep their tokens, see `values.to_json`.

    Args:
        path: .jsonl, with images (arrays, PIL images, bytes) as PNG files in `<stem>_images/` beside it; or .parquet,
            with images inside.
        records: To be written.

    Raises:
        ValueError: For another suffix, and for values that do not fit into a column.
    """
    path = Path(path)
    if path.suffix not in (*LINES, *TABLE):
        raise ValueError(f"{path}: name a file that ends in {', '.join((*LINES, *TABLE))}")
    with replacing(path) as partial:
        if path.suffix in TABLE:
            rows = [_row(_tabular(record), number, _inside) for number, record in enumerate(records)]
            _write_table(partial, _of_one_kind(rows))
            return
        images = ImageFiles(path)
        with partial.open("w", encoding="utf-8") as file:
            for number, record in enumerate(records):
                file.write(json.dumps(_row(record, number, images.beside)) + "\n")


class ImageFiles:
    """Images as PNG: their bytes, or files in a folder beside the file of records or runs at `path`."""

    def __init__(self, path: Path):
        self._folder = path.with_name(f"{path.stem}_images")

    def beside(self, name: str, image: Any) -> str:
        """Write the image into the folder; its path, relative to the file of records."""
        file = self._folder / f"{name}.png"
        write_whole(file, as_png(image, name))
        return f"{self._folder.name}/{file.name}"


def _inside(name: str, image: Any) -> bytes:
    return as_png(image, name)


def _write_table(path: Path, rows: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Write Parquet with a column for each part, which has a field for each name. Raises `ValueError`."""
    # Imported late: it takes a moment.
    import pyarrow as pa
    from pyarrow import parquet

    if not rows:
        raise ValueError("there are no records, and no table without columns: write a .jsonl file")
    parts = {}
    for part in rows[0]:
        fields = {}
        for name in dict.fromkeys(name for row in rows for name in row[part]):
            try:
                fields[name] = pa.array([row[part].get(name) for row in rows])
            except (pa.ArrowException, OverflowError) as error:
                raise ValueError(
                    f"the values of {part}, field {name!r}, are of several kinds or of one that a table does not hold "
                    f"({error}): write a .jsonl file, or make them alike"
                ) from error
        parts[part] = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    parquet.write_table(pa.table(parts), path)


def _tabular(record: PreferenceRecord) -> PreferenceRecord:
    """The record with JSON for tools and arguments of templates, which a table would make all of one shape."""

    def tabular(value: Any) -> Any:
        if not isinstance(value, Mapping) or MESSAGES not in value:
            return value
        return {name: item if name == MESSAGES else json.dumps(item) for name, item in value.items()}

    return replace(record, inputs={name: tabular(value) for name, value in record.inputs.items()})


def _of_one_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with plain texts as objects without tokens where their column holds sampled texts: it has one type."""
    sampled = {
        (part, name) for row in rows for part, values in row.items() for name in values if _has_sampled(values[name])
    }

    def alike(value: Any) -> Any:
        if isinstance(value, str):
            return to_json(SampledText(value, (), "end", ""))
        return [alike(item) for item in value] if isinstance(value, list) else value

    return [
        {
            part: {name: alike(value) if (part, name) in sampled else value for name, value in values.items()}
            for part, values in row.items()
        }
        for row in rows
    ]


def _has_sampled(value: Any) -> bool:
    """Whether the value, as JSON has it, holds a sampled text."""
    if isinstance(value, list):
        return any(map(_has_sampled, value))
    return isinstance(from_json(value), SampledText)


def _row(record: PreferenceRecord, number: int, image: Any) -> dict[str, Any]:
    parts = {"inputs": record.inputs, "chosen": record.chosen, "rejected": record.rejected}
    return {
        part: {name: as_json(value, f"{number}-{part}-{name}", image) for name, value in values.items()}
        for part, values in parts.items()
    }


def as_json(value: Any, name: str, image: Any) -> Any:
    """A value as JSON has it, with what `image(name, image)` returns in the place of an image."""
    if isinstance(value, bytes | Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3):
        return image(name, value)
    if isinstance(value, list | tuple):
        return [as_json(item, f"{name}-{place}", image) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: as_json(item, f"{name}-{key}", image) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else to_json(value)
