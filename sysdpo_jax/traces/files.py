"""Files of traces, in any of the formats: JSON, JSON Lines, Parquet, or a folder of them."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.files import json_lines, read_rows
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import read_text
from sysdpo_jax.traces import dspy, langfuse, langsmith, openinference, otlp
from sysdpo_jax.traces.spans import Span, SpanError

Format = Literal["openinference", "otlp", "dspy", "langsmith", "langfuse"]
# Of a row and its number.
READERS: Mapping[str, Callable[[Mapping[str, Any], int], Iterator[Span]]] = {
    "openinference": lambda row, _: openinference.spans_of(row),
    "otlp": lambda row, _: otlp.spans_of(row),
    "dspy": dspy.spans_of,
    "langsmith": lambda row, _: langsmith.spans_of(row),
    "langfuse": lambda row, _: langfuse.spans_of(row),
}
LINES, OBJECT, TABLE = (".jsonl", ".ndjson"), ".json", ".parquet"
AGAIN = "export the traces again, or take the row out"


def read_spans(path: Path, kind: Format) -> list[Span]:
    """All spans of a file, or of the files of a folder.

    Raises:
        ConfigError: Naming file and row for what is no span of the format, and for files without any.
    """
    found: list[Span] = []
    for file in _files(path):
        for number, row in rows_of(file):
            where = f"{file}, row {number}"
            if not isinstance(row, Mapping):
                raise ConfigError(f"{where} is {type(row).__name__} and no object: is it in the format {kind}?")
            try:
                found += READERS[kind](row, number)
            except SpanError as error:
                raise ConfigError(f"{where} cannot be read as {kind}: {error}; is it another --format?") from None
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{where} is malformed for {kind} ({type(error).__name__}: {str(error)[:200]}): {AGAIN}"
                ) from error
    if not found:
        raise ConfigError(f"{path} holds no span: give a file of traces in the format {kind}")
    return found


def rows_of(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of a file. Raises `ConfigError` for one that does not exist, is damaged, or of another kind."""
    try:
        if file.suffix == TABLE:
            yield from ((row.number, _sound(file, row.values)) for row in read_rows(file))
        elif file.suffix in LINES or _has_lines(file):
            yield from ((row.number, _sound(file, row.values, row.number)) for row in json_lines(file))
        else:
            value = json.loads(read_text(file, str(file), "give a file of traces"))
            yield from enumerate(value if isinstance(value, list) else [value], 1)
    except (RecordError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is no JSON ({error}): it may be cut; export the traces again") from None


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give a file of traces, or a folder of such files")
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (*LINES, OBJECT, TABLE))
    if not found:
        raise ConfigError(f"{path} holds no file of traces ({', '.join((*LINES, OBJECT, TABLE))})")
    return found


def _has_lines(file: Path) -> bool:
    """Whether a file of another name holds an object a line, as the collector writes them into traces.json."""
    read_text(file, str(file), "give a file of traces")
    with file.open(encoding="utf-8-sig") as opened:
        first, second = opened.readline(), opened.readline()
    try:
        return bool(second.strip()) and isinstance(json.loads(first), Mapping)
    except (ValueError, RecursionError):
        return False


def _sound(file: Path, values: Any, number: int = 0) -> Any:
    if isinstance(values, RecordError):
        raise ConfigError(f"{file}, line {number}: {values}; {AGAIN}")
    return values
