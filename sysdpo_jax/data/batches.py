"""Batches as a pure function of the step: a run that resumes neither replays nor skips data.

Rows of like sizes come together, and are padded to few static sizes: every shape of a batch is compiled once.
"""

import shutil
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, PyTree

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.preferences import Preferences
from sysdpo_jax.data.prepared import Prepared, PreparedRows, pair_batch, prepare_in_groups, write_part
from sysdpo_jax.data.records import PreferenceRecord, require_intermediates
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import is_users, name_of, user_code

# Of batches: rows, seed, shard and number of shapes.
Settings: TypeAlias = tuple[int, int, tuple[int, int], int]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# So many batches are read ahead of the step at first, and at most, each in a thread.
AHEAD, MOST_AHEAD = 4, 16
# Sizes are multiples of this, which the devices' matrix units and attention kernels like.
MULTIPLE = 8
# Rows that sizes are chosen by, of a larger data set; records of a list that are prepared together.
LOOKED_AT, TOGETHER = 50_000, 64


@dataclass(frozen=True)
class EpochBatches:
    """`batch_at(step)`, made by `epoch_batches`. data: all rows; rows_at: the numbers of those of a step."""

    data: PyTree
    rows_at: Callable[[int], Int[np.ndarray, "batch"]]

    def __call__(self, step: int) -> PyTree:
        rows = self.rows_at(step)
        return jax.tree.map(lambda x: x[rows], self.data)


def epoch_batches(data: PyTree, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)) -> EpochBatches:
    """Batches of arrays in memory, shuffled anew every epoch by (seed, epoch).

    Rows that do not fill a last batch are left out of that epoch. `Trainer.fit` encodes what of the data is raw once,
    before its first step.

    Args:
        data: Arrays with one leading axis, of all rows, such as those of `prepare_pairs`.
        batch_size: Rows of the global batch.
        seed: Of the order.
        shard: (index, count) gives the index-th of count equal blocks of each batch, as `batch_shard(mesh)` says for
            this process.

    Returns:
        `batch_at(step)`.

    Raises:
        ValueError: For fewer rows than a batch or a batch that count does not divide.
    """
    return EpochBatches(data, epoch_rows(jax.tree.leaves(data)[0].shape[0], batch_size, seed, shard))


def epoch_rows(
    rows: int, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> Callable[[int], Int[np.ndarray, "batch"]]:
    """`rows_at(step)`: the numbers of the rows that `epoch_batches` takes."""
    plan = Plan(np.zeros((rows, 0), np.int32), np.zeros(rows, np.int64), batch_size, seed, shard, 1)
    return lambda step: plan.at(step)[0]


class Plan:
    """Which rows the batch of a step has, and their sizes: a function of the step and of what is given here alone.

    In each epoch the rows are shuffled by (seed, epoch), those of like sizes put together, and the batches shuffled.
    Rows that do not fill a last batch of their kind are left out of that epoch, others in the next one.

    Args:
        sizes: Of every row along every axis [rows, axes].
        kinds: Rows of one number can be in a batch [rows].
        batch_size: Rows of the global batch.
        shard: (index, count) gives the index-th of count equal blocks of each batch.
        shapes: How many static sizes there are at most, but one for every kind at least.

    Raises:
        ValueError: Fewer rows than a batch, or a batch that count does not divide.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "rows axes"],
        kinds: Int[np.ndarray, "rows"],
        batch_size: int,
        seed: int,
        shard: tuple[int, int],
        shapes: int,
    ):
        if shapes < 1:
            raise ValueError(f"shapes {shapes} must be at least 1")
        block = batch_size // check_batches(len(kinds), batch_size, shard)
        self._seed, self._batch, self._block = seed, batch_size, slice(shard[0] * block, (shard[0] + 1) * block)
        every = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self._rows = [rows for rows in every if len(rows) >= batch_size]
        self.per_epoch = sum(len(rows) // batch_size for rows in self._rows)
        if not self.per_epoch:
            raise ValueError(f"no kind of rows fills one batch of {batch_size}: use a smaller batch or more data")
        self.left_out = len(kinds) - sum(map(len, self._rows))
        # Each kind's static sizes [shapes, axes], the smallest first.
        number = max(1, shapes // len(self._rows))
        self.shapes = [static_sizes(sizes[rows], number, batch_size) for rows in self._rows]
        # The smallest that each row fits in.
        self._fits = [_first_fit(sizes[rows], shapes) for rows, shapes in zip(self._rows, self.shapes, strict=True)]
        self._sizes = sizes
        # Threads that read ahead ask for it together.
        self._epoch, self._lock = lru_cache(2)(self._shuffled), Lock()

    def at(self, step: int) -> tuple[Int[np.ndarray, "block"], tuple[int, ...]]:
        """The rows of this shard in the batch of a step, and the sizes of the whole batch."""
        epoch, place = divmod(step, self.per_epoch)
        with self._lock:
            rows, sizes = self._epoch(epoch)[place]
        return rows[self._block], sizes

    def _shuffled(self, epoch: int) -> list[tuple[Int[np.ndarray, "batch"], tuple[int, ...]]]:
        random = np.random.default_rng((self._seed, epoch))
        batches: list[tuple[Int[np.ndarray, batch], tuple[int, ...]]] = []
        for rows, shapes, fits in zip(self._rows, self.shapes, self._fits, strict=True):
            order = random.permutation(len(rows))[: len(rows) // self._batch * self._batch]
            order = order[np.argsort(fits[order], kind="stable")]
            own = rows[order].reshape(-1, self._batch)
            # The largest of each axis: a batch whose rows lie between two shapes has the next one that fits all.
            fit = shapes[_first_fit(self._sizes[own].max(1), shapes)]
            batches += zip(own, map(tuple, fit.tolist()), strict=True)
        # Batches of one shape are in a random order already.
        several = sum(map(len, self.shapes)) > 1
        return [batches[place] for place in random.permutation(len(batches))] if several else batches


def check_batches(rows: int, batch_size: int, shard: tuple[int, int]) -> int:
    """The number of shards. Raises `ValueError` where rows fill no batch or the batch is not cut as the shard says."""
    index, count = shard
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows is none: give at least 1")
    if rows < batch_size:
        raise ValueError(f"{rows} rows do not fill one batch of {batch_size}: use a smaller batch or more data")
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"shard {shard} is no part of a batch of {batch_size} rows: its index must be below its count, which must "
            "divide the batch (batch_shard gives both)"
        )
    return count


def static_sizes(sizes: Int[np.ndarray, "rows axes"], number: int, batch: int) -> Int[np.ndarray, "shapes axes"]:
    """At most `number` sizes that every row fits in one of, chosen so that little is padded; the smallest first.

    The rows are cut in two where that saves most, one group after the other. The largest size is always there: it takes
    the batches whose rows fit nowhere else together.
    """
    groups, whole = [sizes[:: -(-len(sizes) // LOOKED_AT)]], _rounded(sizes)
    found = whole[None]
    while True:
        cuts = [best_cut(group, batch) for group in groups]
        best = int(np.argmax([saved for saved, _, _ in cuts]))
        saved, axis, limit = cuts[best]
        if saved <= 0:
            break
        group = groups.pop(best)
        groups += [group[group[:, axis] <= limit], group[group[:, axis] > limit]]
        cut = np.unique([*(_rounded(group) for group in groups), whole], axis=0)
        if len(cut) > number:
            break
        found = cut
    # What was not looked at may fit in no group's size but the largest.
    return found[np.argsort(found.sum(1), kind="stable")]


def best_cut(sizes: Int[np.ndarray, "rows axes"], batch: int) -> tuple[int, int, int]:
    """(places saved, axis, largest size of the first part) of the best cut; at least a batch on either side."""
    best, rows = (0, 0, 0), len(sizes)
    whole = rows * int(_rounded(sizes).sum())
    for axis in range(sizes.shape[1]):
        ordered = sizes[np.argsort(sizes[:, axis], kind="stable")]
        below = _up(np.maximum.accumulate(ordered, axis=0)).sum(1)
        above = _up(np.maximum.accumulate(ordered[::-1], axis=0)[::-1]).sum(1)
        count = np.arange(1, rows)
        saved = whole - count * below[:-1] - (rows - count) * above[1:]
        # A cut lies between two different sizes.
        usable = (ordered[:-1, axis] < ordered[1:, axis]) & (count >= batch) & (rows - count >= batch)
        place = int(np.argmax(np.where(usable, saved, 0))) if rows > 1 else 0
        if rows > 1 and usable[place] and saved[place] > best[0]:
            best = int(saved[place]), axis, int(ordered[place, axis])
    return best


def _rounded(sizes: Int[np.ndarray, "rows axes"]) -> Int[np.ndarray, "axes"]:
    return _up(sizes.max(0))


def _up(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // MULTIPLE) * MULTIPLE


def _first_fit(sizes: Int[np.ndarray, "rows axes"], shapes: Int[np.ndarray, "shapes axes"]) -> Int[np.ndarray, "rows"]:
    """The first of the shapes that each row fits in."""
    fit = np.full(len(sizes), len(shapes) - 1)
    for place in reversed(range(len(shapes) - 1)):
        fit[(sizes <= shapes[place]).all(1)] = place
    return fit


@runtime_checkable
class Indexed(Protocol[T_co]):
    """Random access by number: a list, a class that reads a file's row when asked, batches, a dataset of Grain."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> T_co: ...


class PreferenceBatches:
    """Batches of preferences that were prepared once: `batches[step]` is that of a step.

    Args:
        system: As for `preference_dataset`, which makes them.
        records: As for `preference_dataset`.
        settings: batch_size, seed, shard and shapes, as for `preference_dataset`.
    """

    def __init__(self, system: CompoundSystem, records: Indexed[PreferenceRecord], settings: Settings):
        self.system, self._records, self._settings = system, records, settings
        batch_size, _, shard, _ = settings
        check_batches(len(records), batch_size, shard)
        self._rows: PreparedRows | None = None
        if isinstance(records, Preferences) and records.fits(system):
            require_intermediates(system, records.held)
            self._use(records.rows, records.usable)
        elif not system.encodes:
            self.prepare({})

    def __len__(self) -> int:
        """There is always a next epoch."""
        return sys.maxsize

    def __getitem__(self, step: int) -> PairBatch:
        if self._rows is None:
            raise ValueError(
                "the system has frozen parts that have still to encode: give load_preferences their params, or hand "
                "the dataset to Trainer.fit or their params to its method prepare"
            )
        rows, sizes = self.plan.at(step)
        found = [self._rows.features(int(row)) for row in self._usable[rows]]
        return pair_batch(self.system, found, dict(zip(self._rows.axes, sizes, strict=True)))

    def prepare(self, params: Params) -> None:
        """Prepare and encode the records where that has not been done, or by other frozen parts.

        Args:
            params: The system's, on this process's devices.

        Raises:
            RecordError: Naming the record that cannot be used, counted from 0.
        """
        given = self._records if isinstance(self._records, Preferences) else None
        if self._rows is not None and (given is None or self._rows is not given.rows or given.encoded_by(params)):
            return
        folder = Path(tempfile.mkdtemp(prefix="sysdpo_jax-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / "part"
        write_part(path, self.system, self._prepared(params), lambda: None)
        rows = PreparedRows([path])
        self._use(rows, np.arange(len(rows)))

    def fingerprint(self) -> dict[str, str]:
        """What a run that goes on must have.

        Returns:
            `{what: text}` of all that the rows of a step depend on.
        """
        batch_size, seed, _, shapes = self._settings
        source = self._records.counts.sha256 if isinstance(self._records, Preferences) else "rows in memory"
        return {"batches": f"{len(self._records)} rows, {batch_size=}, {seed=}, {shapes=}", "records": source}

    def describe(self) -> str:
        """The batches in a line.

        Returns:
            Their static shapes, and what fills no batch.
        """
        if self._rows is None:
            return "batches whose frozen parts have still to encode"
        shapes = sum(map(len, self.plan.shapes))
        axes = [f"{node} {axis}" for node, axis in self._rows.axes]
        sizes = "; ".join(", ".join(map(str, row)) for kind in self.plan.shapes for row in kind.tolist())
        text = f"shapes of batches: {shapes}" + (f" ({', '.join(axes)}: {sizes})" if axes else "")
        return text + (f"; {self.plan.left_out} rows are of a kind that fills no batch" if self.plan.left_out else "")

    def _use(self, rows: PreparedRows, usable: Int[np.ndarray, "rows"]) -> None:
        self._rows, self._usable = rows, usable
        self.plan = Plan(rows.sizes[usable], rows.kinds[usable], *self._settings)

    def _prepared(self, params: Params) -> Iterator[tuple[int, Prepared]]:
        found = ((number, self._record(number)) for number in range(len(self._records)))
        for number, row in prepare_in_groups(self.system, params, found, TOGETHER):
            if isinstance(row, RecordError):
                raise RecordError(f"record {number}, counted from 0: {row}") from row
            require_intermediates(self.system, row.held)
            # Records may hold what no file can, and are there already.
            yield number, row._replace(record=PreferenceRecord({}, {}, {}))

    def _record(self, number: int) -> PreferenceRecord:
        read = f"{name_of(self._records)}.__getitem__" if is_users(self._records) else "reading"
        with user_code(f"{read}, for record {number}, counted from 0,", RecordError, (RecordError,)):
            return self._records[number]


def preference_dataset(
    system: CompoundSystem,
    records: Indexed[PreferenceRecord],
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    *,
    shapes: int = 8,
) -> PreferenceBatches:
    """Endless batches for `Trainer.fit`, read ahead of the step: that of step k is a pure function of k and arguments.

    Records are prepared once, into files: by `load_preferences` with the system, or here. What frozen parts encode is
    left to `Trainer.fit`, which knows their parameters, where `load_preferences` was not given them.
    Rows are shuffled anew every epoch by the seed; batches are made of rows of like sizes, in an order of their own,
    and padded to few static sizes. Rows that do not fill a last batch are left out of that epoch.

    Args:
        system: What the records are prepared for.
        records: A list, what `load_preferences` returns, or anything with a length whose rows are found by number.
        batch_size: Rows of the global batch.
        seed: Of the order.
        shard: (index, count): this process gives the index-th of count equal blocks of its rows, see `batch_shard`.
        shapes: At most so many of batches, each compiled once; images of several sizes have at least one each.

    Returns:
        The batches by step.

    Raises:
        RecordError: Names the record that cannot be used, counted from 0.
        ValueError: Fewer records than a batch, or a batch that count does not divide.
    """
    return PreferenceBatches(system, records, (batch_size, seed, shard, shapes))


@contextmanager
def read_ahead(dataset: Indexed[T], step: int) -> Iterator[Iterator[T]]:
    """Read a dataset in threads, ahead of who takes its elements; they end with the context.

    Whenever an element is not there when it is asked for, one more is read at a time from then on, up to `MOST_AHEAD`:
    a disk that takes nearly that many steps' time for a batch holds up none of them.

    Args:
        dataset: Elements by number.
        step: Of the first one.

    Yields:
        An iterator over the elements. Threads are left alone after a moment where one never comes.
    """
    with DaemonExecutor(MOST_AHEAD, "read-ahead") as threads:
        yield _elements(dataset, step, threads)


def _elements(dataset: Indexed[T], step: int, threads: Executor) -> Iterator[T]:
    ahead, most = deque[Future[T]](), AHEAD
    for last in range(step, len(dataset)):
        ahead.append(threads.submit(dataset.__getitem__, last))
        if len(ahead) > most:
            if not ahead[0].done():
                most = min(most + 1, MOST_AHEAD)
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
