"""Files of preferences: checked once, then read record by record. However many rows they have, few are in memory."""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.checks import check_records, resolve_images
from sysdpo_jax.data.readers import READERS, Reader
from sysdpo_jax.data.records import PreferenceRecord, check_intermediates
from sysdpo_jax.data.rows import Row, read_rows
from sysdpo_jax.data.stored import StoredRecords, write_records
from sysdpo_jax.data.tool_values import ToolValues, with_kept_values
from sysdpo_jax.data.tools import stored_with_tools
from sysdpo_jax.graph import CompoundSystem, Known
from sysdpo_jax.user_code import is_users, name_of, shown, user_code

# Records that are checked together; one by one only where some of them fail.
TOGETHER = 64
# Errors that are kept to be shown.
KEPT_ERRORS = 5
# What the folder of a result holds.
RECORDS, COUNTS = "records.arrow", "counts.json"


@dataclass
class Counts:
    """read: rows; kept: records; ties: rows without a preference; skipped: what had errors, of which some are kept.

    sha256: of the file, or of the rows of a data set of many files.
    """

    read: int = 0
    kept: int = 0
    ties: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    sha256: str = ""


class Preferences(Sequence[PreferenceRecord]):
    """Records by number, read from a memory-mapped file when they are asked for. Made by `load_preferences`."""

    def __init__(self, folder: Path, source: str):
        self._records, self._source = StoredRecords(folder / RECORDS), source
        self.counts = Counts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, row: int) -> PreferenceRecord: ...

    @overload
    def __getitem__(self, row: slice) -> list[PreferenceRecord]: ...

    def __getitem__(self, row: int | slice) -> PreferenceRecord | list[PreferenceRecord]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        return self._records[row % len(self)]

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
    ignore: Sequence[str] = (),
    cache: str | Path | None = None,
    tool_values: str | Path | None = None,
) -> Preferences:
    """Read preferences: every row once, into a file that is memory-mapped.

    source: a .jsonl or .parquet file, or a folder or hub name that `datasets.load_dataset` takes, with its `split`.
    reader: a name in `readers.READERS` ("records": objects "inputs", "chosen" and "rejected"; "trl", "pick_a_pic",
    "ranked", "ranked_all"), or a function of a row and the system, such as `Ranked("all", min_margin=0.1)`.
    ignore: fields of rows that are left unread; others that the reader does not know are errors where they hold
    something. A function of your own gets the rest of the row, and what it does not read is its own business.
    system: what the records are checked against, see `check_records`; paths of images then begin at the file's folder,
    and values of tools that rows lack are filled in: a tool is called once for what it reads.
    on_error: "skip" leaves rows with errors out and counts them, as a tool's own on_error does for rows that it fails.
    cache: a folder for that file. Where it exists it is taken as it is, for the same source, system and reader: remove
    it when one of them has changed. Without it the file is a temporary one that goes with the result.
    tool_values: a file (JSON Lines) that keeps what tools gave, each value as soon as its call returns, and from which
    a later call takes it: whatever ends the reading, a kill included, loses the calls under way alone. A value belongs
    to the node, the name of the function and the parents' values; one that JSON, with bytes, does not give back as it
    is, or of parents that are no plain values or arrays, is not kept. Remove the file when a function gives something
    else.
    A row may have an "id", which no other one has.
    Raises `RecordError` naming file, row and field, `FileNotFoundError`, and `ValueError` for an unknown reader, for
    `ignore` without a list of names, and for `tool_values` that hold something else.
    """
    if isinstance(ignore, str):
        raise ValueError(f"ignore {ignore!r} is one text: give the names of fields in a tuple, ({ignore!r},)")
    if isinstance(reader, str) and reader not in READERS:
        raise ValueError(f"unknown reader {reader!r}: choose one of {', '.join(READERS)}")
    convert = READERS[reader] if isinstance(reader, str) else reader
    if cache is not None and Path(cache).exists():
        return Preferences(Path(cache), str(source))
    if system is not None and tool_values is not None:
        system = with_kept_values(system, ToolValues(Path(tool_values)))
    counts, base = Counts(), _folder_of(source)
    made = _temporary_folder(cache)
    try:
        write_records(
            made / RECORDS, _checked(source, split, convert, ignore, system, base, on_error == "skip", counts)
        )
        if not counts.kept:
            first = f" ({counts.errors[0]})" if counts.errors else ""
            raise RecordError(f"{source} holds no record{first}: give a file with at least one that can be used")
        (made / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
        if cache is not None:
            return Preferences(_moved(made, Path(cache)), str(source))
        result = Preferences(made, str(source))
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    weakref.finalize(result, shutil.rmtree, made, ignore_errors=True)
    return result


def _folder_of(source: str | Path) -> Path:
    """Where relative paths of images begin."""
    path = Path(source)
    return path if path.is_dir() else path.parent if path.is_file() else Path()


def _temporary_folder(cache: str | Path | None) -> Path:
    """A new one, beside the cache if there is to be one, so that it can be moved there whole."""
    if cache is None:
        return Path(tempfile.mkdtemp(prefix="sysdpo_jax-"))
    parent = Path(cache).parent
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{Path(cache).name}.partial-", dir=parent))
    # Other users of a shared folder read it as they read what is beside it.
    made.chmod(0o755)
    return made


def _moved(made: Path, cache: Path) -> Path:
    """The cache, from what was made or, where another process was faster, from what that one made."""
    try:
        made.rename(cache)
    except OSError:
        if not cache.exists():
            raise
        shutil.rmtree(made, ignore_errors=True)
    return cache


def _checked(
    source: str | Path,
    split: str,
    convert: Reader,
    ignore: Sequence[str],
    system: CompoundSystem | None,
    folder: Path,
    skip: bool,
    counts: Counts,
) -> Iterator[PreferenceRecord]:
    """The records in their order, checked; errors are raised with their place, or counted."""
    ids: dict[Any, int] = {}
    waiting: list[tuple[int, PreferenceRecord]] = []
    held: bool | None = None
    # Of the rows that wait: checked once more, or on both sides, a tool is not called again.
    known: Known = {}

    def refuse(number: int, error: RecordError) -> None:
        message = f"{source}, row {number}: {error}"
        if not skip and not (isinstance(error, ToolError) and error.skip):
            raise RecordError(message) from error.__cause__
        counts.skipped += 1
        if len(counts.errors) < KEPT_ERRORS:
            counts.errors.append(message)

    def passed() -> Iterator[PreferenceRecord]:
        nonlocal held
        for number, record, error in _verdicts(system, waiting, known):
            if system is not None and error is None:
                try:
                    held = check_intermediates(system, record, held)
                except RecordError as mixed:
                    error = mixed
            if error is not None:
                refuse(number, error)
            else:
                counts.kept += 1
                yield record if system is None else stored_with_tools(system, record, known)
        waiting.clear()
        known.clear()

    one_file = Path(source).is_file()
    rows = hashlib.sha256()
    for row in read_rows(source, split):
        counts.read += 1
        if not one_file:
            rows.update(json.dumps(row.values, default=repr).encode())
        try:
            made = _converted(row, convert, ignore, system, ids)
        except RecordError as error:
            refuse(row.number, error)
            continue
        counts.ties += not made
        waiting += [(row.number, _placed(system, record, folder)) for record in made]
        if len(waiting) >= TOGETHER:
            yield from passed()
    yield from passed()
    counts.sha256 = _digest(Path(source)) if one_file else rows.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(
    row: Row, convert: Reader, ignore: Sequence[str], system: CompoundSystem | None, ids: dict[Any, int]
) -> list[PreferenceRecord]:
    if isinstance(row.values, RecordError):
        raise row.values
    values = {name: value for name, value in row.values.items() if name not in ignore}
    own = values.get("id")
    if own is not None:
        if not isinstance(own, str | int):
            raise RecordError(f"the field 'id' is {type(own).__name__}: give a text or a whole number, or leave it out")
        if own in ids:
            raise RecordError(f"the id {own!r} is that of row {ids[own]} too: make ids unique, or leave them out")
        ids[own] = row.number
    if not is_users(convert):
        return convert(values, system)
    with user_code(f"the reader {name_of(convert)}", RecordError, (RecordError,)):
        made: Any = convert(values, system)
        # Here, because a generator runs only now.
        found = list(made) if isinstance(made, Iterable) else made
    if not isinstance(found, list) or not all(isinstance(record, PreferenceRecord) for record in found):
        raise RecordError(
            f"the reader {name_of(convert)} returned {shown({'value': made})}: return a list of PreferenceRecord, none "
            "for a tie"
        )
    return found


def _placed(system: CompoundSystem | None, record: PreferenceRecord, folder: Path) -> PreferenceRecord:
    return record if system is None else resolve_images(system, record, folder)


def _verdicts(
    system: CompoundSystem | None, records: Sequence[tuple[int, PreferenceRecord]], known: Known
) -> Iterator[tuple[int, PreferenceRecord, RecordError | None]]:
    """Every record with what is wrong with it."""
    together = [record for _, record in records]
    fine = system is None or _refusal(check_records, system, together, known) is None
    for number, record in records:
        yield number, record, None if fine or system is None else _refusal(check_records, system, [record], known)


def _refusal(check: Callable[..., None], *args: Any) -> RecordError | None:
    """What the check raises."""
    try:
        check(*args)
    except RecordError as error:
        return error
    return None
