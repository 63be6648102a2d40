"""Preferences from files: read, prepared, encoded and stored in one pass, once. Few rows are in memory at a time."""

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import jax
import numpy as np

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.components.tool_values import ToolValues
from sysdpo_jax.data.files import Row, known_digest, read_rows, source_digest
from sysdpo_jax.data.formats import Reader, States, call_reader, placed, reader_of, require_holdable
from sysdpo_jax.data.prepared import (
    UNDECIDED,
    Prepared,
    PreparedRows,
    about_system,
    is_fresh,
    part_about,
    prepare_in_groups,
    remedy,
    with_kept_values,
    write_part,
)
from sysdpo_jax.data.records import Counts, PreferenceRecord, check_intermediates
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import locked_file, read_json, write_json
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.processes import by_all
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import is_users

# Rows of the source in a part, which a kill loses at most; records that are prepared together: without and with images.
PART, PART_WITH_IMAGES, TOGETHER, TOGETHER_WITH_IMAGES = 4096, 256, 128, 16
# Raised when what is written changes; files that say how many parts there are, and where values of tools came from.
FORMAT, WHOLE, TOOLS = 3, "parts.json", "tool_values.json"

# The digest of a system and the fingerprints of its frozen parts.
About: TypeAlias = tuple[str, dict[str, str]]


@dataclass(eq=False, repr=False)
class Preferences(Sequence[PreferenceRecord]):
    """Records by number, read from memory-mapped files when they are asked for, and their features where there are any.

    Args:
        rows: What is on disk; `load_preferences` makes it.
        usable: The numbers of the rows that count.
        counts: Of the rows that were read, and of those left out.
        source: Where they come from.
        system: The one that the features are of; None where there are none.
        about: Its digest, and fingerprints of what encoded them.
    """

    rows: PreparedRows
    usable: np.ndarray
    counts: Counts
    source: str
    system: CompoundSystem | None
    about: About

    def __len__(self) -> int:
        return len(self.usable)

    @overload
    def __getitem__(self, row: int) -> PreferenceRecord: ...

    @overload
    def __getitem__(self, row: slice) -> list[PreferenceRecord]: ...

    def __getitem__(self, row: int | slice) -> PreferenceRecord | list[PreferenceRecord]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        return self.rows.record(int(self.usable[row]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def fits(self, system: CompoundSystem) -> bool:
        """Whether the features are there, and those that the system prepares: with these tokenizers and settings.

        Args:
            system: To compare with.

        Returns:
            Whether they are.
        """
        return self.system is not None and digest(about_system(system)) == self.about[0]

    def encoded_by(self, params: Params) -> bool:
        """Whether the frozen parts of these parameters are those that encoded the features.

        Args:
            params: `{params_key: tree}`.

        Returns:
            Whether they are.
        """
        return self.system is not None and fingerprints(self.system.frozen_params(params)) == self.about[1]

    @property
    def held(self) -> bool:
        """Whether the records hold the system's intermediate values; True where no system is known."""
        return bool(self.rows.held[self.usable].all())

    def summary(self) -> str:
        """The counts in a line.

        Returns:
            With the first of the errors and how many were left out for what.
        """
        return self.counts.summary(self.source)


def load_preferences(
    source: str | Path,
    system: CompoundSystem | None = None,
    reader: str | Reader = "records",
    *,
    params: Params | None = None,
    split: str = "train",
    on_error: Literal["stop", "skip"] = "stop",
    ignore: Sequence[str] = (),
    cache: str | Path | None = None,
    tool_values: str | Path | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Preferences:
    """Read preferences: every row once, into files that are memory-mapped.

    With a system every record is prepared for it: a record is kept if and only if that works, and paths of images begin
    at the source's folder. Values of tools that rows lack are filled in; a tool is called once for what it reads.
    The features are kept with the records, so that training from `preference_dataset` reads arrays alone; where a
    system has frozen encoders that takes their parameters.

    Args:
        source: A .jsonl, .parquet or .json file (one list), or a folder or hub name that `datasets.load_dataset` takes.
        system: What the records are prepared for.
        reader: A name in `formats.READERS` ("records": objects "inputs", "chosen" and "rejected"; "trl", "pick_a_pic",
            "ranked", "ranked_all", "label_studio", "argilla"), or a function of a row and the system, such as
            `Ranked("all", min_margin=0.1)`, or "module:name" of one.
        params: Of the system, `{params_key: tree}`: its frozen parts encode. Of several processes each gives the whole
            frozen parts on its own devices, see `replicate_per_process`.
        split: Of a folder or hub name.
        on_error: "skip" leaves rows with errors out and counts them by reason, as a tool's own on_error does for rows
            that it fails.
        ignore: Fields of rows that are left unread; others that the reader does not know are errors where they hold
            something. A function of your own gets the rest of the row, and what it does not read is its own business.
        cache: A folder that keeps the files, in a folder of their own for each fingerprint of source, reader, settings,
            system, tokenizers and frozen parameters: what is there is read within seconds, what a kill left is gone on
            with, and several processes make parts of it each. Without it the files are temporary and go with the
            result, and each process makes all of them.
        tool_values: A file (JSON Lines) that keeps what tools gave, each value as soon as its call returns, and from
            which a later call takes it: whatever ends the reading, a kill included, loses the calls under way alone. A
            value belongs to the node, the name of the function and the parents' values; what JSON, with bytes, does not
            give back as it is, or parents that are no plain values, is not kept. Remove it to have tools asked again.
        progress: Is told how many rows this process has read.

    Returns:
        The records, and what was counted. A row may have an "id", which no other one has.

    Raises:
        RecordError: Names file, row and field.
        FileNotFoundError: There is no such file.
        ValueError: For a setting that there is not, and `tool_values` that hold something else.
    """
    if isinstance(ignore, str):
        raise ValueError(f"ignore {ignore!r} is one text: give the names of fields in a tuple, ({ignore!r},)")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error {on_error!r} is neither 'stop' nor 'skip'")
    convert = reader_of(reader) if isinstance(reader, str) else reader
    called, kept = system, None
    if system is not None and tool_values is not None:
        called = with_kept_values(system, ToolValues(Path(tool_values)))
        kept = Path(tool_values).resolve() if called != system else None
    reading = _Pass(source, split, convert, tuple(ignore), called, params, on_error == "skip", progress)
    featured = system if system is not None and (params is not None or not system.encodes) else None
    frozen = {} if featured is None else fingerprints(featured.frozen_params(params or {}))
    about = digest(about_system(system)), frozen
    if cache is None:
        sha256, folder = source_digest(source, split), Path(tempfile.mkdtemp(prefix="sysdpo_jax-"))
        try:
            reading.write(folder, 0, 1)
            made = reading.open(folder, sha256, featured, about)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        return made

    def named() -> tuple[str, Path]:
        sha256 = known_digest(source, split, Path(cache))
        base = str(reading.folder) if reading.paints else ""
        settings = (FORMAT, reading.size, sha256, split, convert, tuple(ignore), on_error, base, str(kept))
        folder = Path(cache) / digest([*settings, *about])
        noted = folder / TOOLS
        first = jax.process_index() == 0
        if kept is not None and first and noted.exists() and _inode(kept) != read_json(noted, remedy(noted)):
            # Whoever removes the file of what tools gave wants them asked again.
            shutil.rmtree(folder)
        return sha256, folder

    def write(folder: Path) -> None:
        if (folder / WHOLE).exists() and all(map(is_fresh, _parts(folder))):
            # All is there, of files that are as they were. Says when it was used, where that can be written.
            with suppress(OSError):
                os.utime(folder)
            return
        # Of several runs that begin together one makes the parts, and the others wait and take them.
        with locked_file(folder / f"writer-{jax.process_index()}", wait=True):
            reading.write(folder, jax.process_index(), jax.process_count())
        if kept is not None and jax.process_index() == 0:
            write_json(folder / TOOLS, _inode(kept))

    # What is removed is gone before any process looks for it.
    sha256, folder = by_all(named)
    by_all(lambda: write(folder))
    return reading.open(folder, sha256, featured, about)


def _inode(path: Path) -> int:
    """Tells a file from another one of that name; 0 where there is none."""
    return path.stat().st_ino if path.exists() else 0


def _parts(folder: Path) -> list[Path]:
    return [folder / f"part-{part:05d}" for part in range(read_json(folder / WHOLE, remedy(folder / WHOLE)))]


@dataclass
class _Pass:
    """One reading of the source. held: whether the records so far have intermediate values, where all must have."""

    source: str | Path
    split: str
    convert: Reader
    ignore: tuple[str, ...]
    system: CompoundSystem | None
    params: Params | None
    skip: bool
    progress: Callable[[int], None]
    held: bool | None = None
    read: int = 0

    @property
    def paints(self) -> bool:
        """Whether records name files of images."""
        return self.system is not None and any(isinstance(node.component, TextToImage) for node in self.system.nodes)

    @property
    def size(self) -> int:
        """Rows of the source in a part."""
        return PART_WITH_IMAGES if self.paints else PART

    @property
    def folder(self) -> Path:
        """Where paths of images begin, wherever a later run is started."""
        path = Path(self.source)
        return (path if path.is_dir() else path.parent if path.is_file() else Path()).resolve()

    def write(self, folder: Path, index: int, count: int) -> None:
        """Make the parts index, index + count, ... that are not there yet."""
        ids, number = dict[Any, int](), -1
        rows = enumerate(read_rows(self.source, self.split))
        for number, numbered in groupby(rows, lambda pair: pair[0] // self.size):
            part = folder / f"part-{number:05d}"
            own = (self._identified(row, ids) for _, row in numbered)
            if number % count == index and not is_fresh(part):
                counts, images = Counts(), States()
                about = lambda c=counts, i=images: {"counts": asdict(c), "files": list(i.items())}  # noqa: E731
                write_part(part, self.system, self._made(own, counts, images), about)
            # What is left of the rows says which ids there are.
            deque(own, maxlen=0)
        if index == 0:
            write_json(folder / WHOLE, number + 1)

    def open(self, folder: Path, sha256: str, system: CompoundSystem | None, about: About) -> Preferences:
        """What was written. Raises `RecordError` where it holds no record, or records of two kinds."""
        parts = _parts(folder) if (folder / WHOLE).exists() else None
        known: list[Any] = [None] if parts is None else [part_about(part) for part in parts]
        if parts is None or None in known:
            raise RecordError(f"{folder} lacks parts that another process made: give a cache that all processes share")
        counts = Counts(sha256=sha256)
        for told in known:
            counts.add(Counts(**told["counts"]))
        if not counts.kept:
            first = f" ({counts.errors[0]})" if counts.errors else ""
            raise RecordError(f"{self.source} holds no record{first}: give a file with at least one that can be used")
        rows = PreparedRows(parts)
        # All are as the first one is that says it, whichever process made it.
        says = rows.held != UNDECIDED
        holds = bool(rows.held[np.argmax(says)])
        unlike = says & (rows.held != holds)
        other = np.flatnonzero(unlike)
        for row in other.tolist():
            try:
                assert self.system is not None
                check_intermediates(self.system, rows.record(row), holds)
            except RecordError as error:
                counts.kept -= 1
                self._refuse(counts, int(rows.numbers[row]), error)
        usable = np.flatnonzero(~unlike)
        return Preferences(rows, usable, counts, str(self.source), system, about)

    def _refuse(self, counts: Counts, number: int, error: RecordError) -> None:
        message = f"{self.source}, row {number}: {error}"
        if not self.skip and not (isinstance(error, ToolError) and error.skip):
            raise RecordError(message) from error.__cause__
        counts.skip(message, error)

    def _made(self, rows: Iterable[Row], counts: Counts, images: States) -> Iterator[tuple[int, Prepared]]:
        """The records of these rows with their numbers, ready to be written; images: the files that they name."""
        together = TOGETHER_WITH_IMAGES if self.paints else TOGETHER
        found = self._records(rows, counts, images)
        for number, made in prepare_in_groups(self.system, self.params, found, together):
            self.progress(self.read)
            try:
                if isinstance(made, RecordError):
                    raise made
                # `open` leaves out those that may be left out.
                if self.system is not None and not self.skip:
                    self.held = check_intermediates(self.system, made.record, self.held)
            except RecordError as error:
                self._refuse(counts, number, error)
            else:
                counts.kept += 1
                yield number, made
        self.progress(self.read)

    def _records(
        self, rows: Iterable[Row], counts: Counts, images: States
    ) -> Iterator[tuple[int, PreferenceRecord | RecordError]]:
        for row in rows:
            counts.read += 1
            self.read += 1
            try:
                if isinstance(row.values, RecordError):
                    raise row.values
                values = {name: value for name, value in row.values.items() if name not in self.ignore}
                made = call_reader(self.convert, values, self.system)
                found = [placed(record, self.system, self.folder, images) for record in made]
                for record in found if is_users(self.convert) else ():
                    require_holdable(self.convert, record)
            except RecordError as error:
                yield row.number, error
            else:
                counts.ties += not found
                yield from ((row.number, record) for record in found)

    def _identified(self, row: Row, ids: dict[Any, int]) -> Row:
        """The row, or what is wrong with its id."""
        own = row.values.get("id") if isinstance(row.values, dict) and "id" not in self.ignore else None
        if own is None:
            return row
        if not isinstance(own, str | int):
            said = f"the field 'id' is {type(own).__name__}: give a text or a whole number, or leave it out"
        elif own in ids:
            said = f"the id {own!r} is that of row {ids[own]} too: make ids unique, or leave them out"
        else:
            ids[own] = row.number
            return row
        return Row(row.number, RecordError(said))
