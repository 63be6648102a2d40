"""Files of preferences: checked once, then read record by record. However many rows they have, few are in memory."""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.checks import check_intermediates, check_records, holds_intermediates, resolve_images
from sysdpo_jax.data.readers import READERS, Reader
from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.data.rows import Row, read_rows
from sysdpo_jax.graph import CompoundSystem

# Records that are checked together; one by one only where some of them fail.
TOGETHER = 64
# Errors that are kept to be shown.
KEPT_ERRORS = 5
# Stands in a record's JSON for the bytes of that number.
BYTES = "\0bytes"


@dataclass
class Counts:
    """read: rows; kept: records; ties: rows without a preference; skipped: what had errors, of which some are kept."""

    read: int = 0
    kept: int = 0
    ties: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)


class Preferences(Sequence[PreferenceRecord]):
    """Records by number, read from a memory-mapped file when they are asked for. Made by `load_preferences`."""

    def __init__(self, table: Any, counts: Counts, source: str):
        self._table, self.counts, self._source = table, counts, source

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, row: int) -> PreferenceRecord: ...

    @overload
    def __getitem__(self, row: slice) -> list[PreferenceRecord]: ...

    def __getitem__(self, row: int | slice) -> PreferenceRecord | list[PreferenceRecord]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        stored = self._table[row % len(self)]
        return PreferenceRecord(*(_unpacked(part, stored["blobs"]) for part in json.loads(stored["record"])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def summary(self) -> str:
        """The counts in a line, with the first of the errors."""
        counts = self.counts
        ties = f", {counts.ties} without a preference" if counts.ties else ""
        skipped = f", {counts.skipped} skipped (the first: {counts.errors[0]})" if counts.skipped else ""
        return f"{self._source}: {counts.read} rows, {counts.kept} preferences{ties}{skipped}"


def load_preferences(
    source: str | Path,
    system: CompoundSystem | None = None,
    reader: str | Reader = "records",
    *,
    split: str = "train",
    on_error: Literal["stop", "skip"] = "stop",
) -> Preferences:
    """Read preferences: every row once, into a temporary file that is memory-mapped and goes with the result.

    source: a .jsonl or .parquet file, or a folder or hub name that `datasets.load_dataset` takes, with its `split`.
    reader: a name in `readers.READERS` ("records": objects "inputs", "chosen" and "rejected"; "trl", "pick_a_pic",
    "ranked", "ranked_all"), or a function of a row and the system, such as `Ranked("all", min_margin=0.1)`.
    system: what the records are checked against, see `check_records`; paths of images then begin at the file's folder.
    on_error: "skip" leaves rows with errors out and counts them.
    A row may have an "id", which no other one has.
    Raises `RecordError` naming file, row and field, `FileNotFoundError`, and `ValueError` for an unknown reader.
    """
    if isinstance(reader, str) and reader not in READERS:
        raise ValueError(f"unknown reader {reader!r}: choose one of {', '.join(READERS)}")
    convert = READERS[reader] if isinstance(reader, str) else reader
    counts, folder = Counts(), tempfile.TemporaryDirectory(prefix="sysdpo_jax-")
    base = Path(source).parent if Path(source).is_file() else Path()
    try:
        path = str(Path(folder.name) / "preferences.arrow")
        _write(path, _checked(source, split, convert, system, base, on_error == "skip", counts))
        if not counts.kept:
            raise RecordError(f"{source} holds no record" + (f" ({counts.errors[0]})" if counts.errors else ""))
        table = _mapped(path)
    except BaseException:
        folder.cleanup()
        raise
    made = Preferences(table, counts, str(source))
    weakref.finalize(made, folder.cleanup)
    return made


def _checked(
    source: str | Path,
    split: str,
    convert: Reader,
    system: CompoundSystem | None,
    folder: Path,
    skip: bool,
    counts: Counts,
) -> Iterator[PreferenceRecord]:
    """The records in their order, checked; errors are raised with their place, or counted."""
    ids: dict[Any, int] = {}
    waiting: list[tuple[int, PreferenceRecord]] = []
    first: list[bool] = []

    def refuse(number: int, error: RecordError) -> None:
        message = f"{source}, row {number}: {error}"
        if not skip:
            raise RecordError(message) from None
        counts.skipped += 1
        if len(counts.errors) < KEPT_ERRORS:
            counts.errors.append(message)

    def passed() -> Iterator[PreferenceRecord]:
        for number, record, error in _verdicts(system, waiting):
            if system is not None and error is None:
                # As the first record of all does.
                first[:] = first or [holds_intermediates(system, record.chosen)]
                error = _refusal(check_intermediates, system, record, first[0])
            if error is not None:
                refuse(number, error)
            else:
                counts.kept += 1
                yield record
        waiting.clear()

    for row in read_rows(source, split):
        counts.read += 1
        try:
            made = _converted(row, convert, system, ids)
        except RecordError as error:
            refuse(row.number, error)
            continue
        counts.ties += not made
        waiting += [(row.number, _placed(system, record, folder)) for record in made]
        if len(waiting) >= TOGETHER:
            yield from passed()
    yield from passed()


def _converted(row: Row, convert: Reader, system: CompoundSystem | None, ids: dict[Any, int]) -> list[PreferenceRecord]:
    if isinstance(row.values, RecordError):
        raise row.values
    own = row.values.get("id")
    if own is not None:
        if own in ids:
            raise RecordError(f"the id {own!r} is that of row {ids[own]} too: make ids unique, or leave them out")
        ids[own] = row.number
    return convert(row.values, system)


def _placed(system: CompoundSystem | None, record: PreferenceRecord, folder: Path) -> PreferenceRecord:
    return record if system is None else resolve_images(system, record, folder)


def _verdicts(
    system: CompoundSystem | None, records: Sequence[tuple[int, PreferenceRecord]]
) -> Iterator[tuple[int, PreferenceRecord, RecordError | None]]:
    """Every record with what is wrong with it."""
    together = [record for _, record in records]
    fine = system is None or _refusal(check_records, system, together) is None
    for number, record in records:
        yield number, record, None if fine or system is None else _refusal(check_records, system, [record])


def _refusal(check: Callable[..., None], *args: Any) -> RecordError | None:
    """What the check raises."""
    try:
        check(*args)
    except RecordError as error:
        return error
    return None


def _write(path: str, records: Iterator[PreferenceRecord]) -> None:
    # Imported late: it takes a second.
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"record": Value("large_string"), "blobs": List(Value("large_binary"))})
    with ArrowWriter(path=path, features=features, writer_batch_size=TOGETHER) as writer:
        for record in records:
            blobs: list[bytes] = []
            parts = [_packed(part, blobs) for part in (record.inputs, record.chosen, record.rejected)]
            writer.write({"record": json.dumps(parts), "blobs": blobs})
        writer.finalize()


def _mapped(path: str) -> Any:
    from datasets import Dataset

    return Dataset.from_file(path)


def _packed(value: Any, blobs: list[bytes]) -> Any:
    """The value as JSON has it, its bytes moved to `blobs`."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {BYTES: len(blobs) - 1}
    if isinstance(value, Mapping):
        return {name: _packed(item, blobs) for name, item in value.items()}
    return [_packed(item, blobs) for item in value] if isinstance(value, list | tuple) else value


def _unpacked(value: Any, blobs: Sequence[bytes]) -> Any:
    if isinstance(value, dict):
        return blobs[value[BYTES]] if BYTES in value else {name: _unpacked(item, blobs) for name, item in value.items()}
    return [_unpacked(item, blobs) for item in value] if isinstance(value, list) else value
