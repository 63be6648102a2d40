"""Batches as a pure function of the step: a run that resumes neither replays nor skips data.

Rows of like sizes come together, and are padded to few static sizes: every shape of a batch is compiled once.
"""

import math
import shutil
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, PyTree

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.routed import Routed, room_for
from sysdpo_jax.data.plan import Plan, check_batches, check_parts
from sysdpo_jax.data.preferences import Preferences
from sysdpo_jax.data.prepared import Prepared, PreparedRows, pair_batch, prepare_in_groups, write_part
from sysdpo_jax.data.records import SIDES, PreferenceRecord, require_intermediates
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.typing import Features, Params
from sysdpo_jax.user_code import is_users, name_of, user_code

# Of batches: rows, seed, shard and number of shapes.
Settings: TypeAlias = tuple[int, int, tuple[int, int], int]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# So many batches are read ahead of the step at first, and at most, each in a thread.
AHEAD, MOST_AHEAD = 4, 16
# Records of a list that are prepared together.
TOGETHER = 64


@dataclass(frozen=True)
class EpochBatches:
    """`batch_at(step)`, made by `epoch_batches`.

    data: all rows; rows_at: the numbers of those of a step; whole_at: of all shards together; accumulate: the step's.
    """

    data: PyTree
    rows_at: Callable[[int], Int[np.ndarray, "block"]]
    whole_at: Callable[[int], Int[np.ndarray, "batch"]]
    accumulate: int

    def __call__(self, step: int) -> PyTree:
        rows = self.rows_at(step)
        batch = jax.tree.map(lambda x: x[rows], self.data)
        if not isinstance(self.data, PairBatch):
            return batch
        whole = self.whole_at(step)
        return in_rooms(batch, {name: runs[whole] for name, runs in _runs(self.data).items()}, self.accumulate)


def _runs(pairs: PairBatch) -> dict[str, Int[np.ndarray, "rows"]]:
    """Of the nodes that do not run in every row how many runs each row has, on both sides."""
    number = lambda routed: np.reshape(routed.ran, (len(routed.ran), -1)).sum(1)  # noqa: E731
    routed = [name for name, features in pairs.chosen.items() if isinstance(features, Routed)]
    return {name: number(pairs.chosen[name]) + number(pairs.rejected[name]) for name in routed}


def epoch_batches(
    data: PyTree, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1), *, accumulate: int = 1
) -> EpochBatches:
    """Batches of arrays in memory, shuffled anew every epoch by (seed, epoch).

    Rows that do not fill a last batch are left out of that epoch. `Trainer.fit` encodes what of the data is raw once,
    before its first step.

    Args:
        data: Arrays with one leading axis, of all rows, such as those of `prepare_pairs`.
        batch_size: Rows of the global batch.
        seed: Of the order.
        shard: (index, count) gives the index-th of count equal blocks of each batch, as `batch_shard(mesh)` says for
            this process.
        accumulate: That of the step, which computes little more than what runs in each part of a batch that is made for
            it. A step with another one gives the same and computes more.

    Returns:
        `batch_at(step)`.

    Raises:
        ValueError: For fewer rows than a batch or a batch that count or accumulate does not divide.
    """
    runs = _runs(data) if isinstance(data, PairBatch) else {}
    plan = _plan(jax.tree.leaves(data)[0].shape[0], batch_size, seed, shard, [*runs.values()])
    check_parts(batch_size, accumulate)
    return EpochBatches(data, lambda step: plan.at(step)[0], lambda step: plan.whole(step)[0], accumulate)


def in_rooms(batch: PairBatch, runs: Mapping[str, Int[np.ndarray, "rows"]], parts: int) -> PairBatch:
    """The batch, whose step computes the runs that there are of these nodes and little more.

    runs: `{node: their number in each row}` on both sides of the whole batch, of all processes. parts: into how many
    the step cuts it, of which one has every so manieth row.
    """

    def with_room(name: str, features: Features) -> Features:
        if name not in runs:
            return features
        most = int(runs[name].reshape(-1, parts).sum(0).max())
        places = 2 * len(runs[name]) // parts * math.prod(features.ran.shape[1:])
        return replace(features, room=parts * room_for(most, places), parts=parts)

    sides = ({name: with_room(name, own) for name, own in side.items()} for side in (batch.chosen, batch.rejected))
    return batch._replace(**dict(zip(SIDES, sides, strict=True)))


def epoch_rows(
    rows: int, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> Callable[[int], Int[np.ndarray, "batch"]]:
    """`rows_at(step)`: the numbers of the rows that `epoch_batches` takes."""
    plan = _plan(rows, batch_size, seed, shard)
    return lambda step: plan.at(step)[0]


def _plan(
    rows: int, batch_size: int, seed: int, shard: tuple[int, int], runs: Sequence[Int[np.ndarray, "rows"]] = ()
) -> "Plan":
    """Of rows of one size. runs: of each node that does not run in all of them."""
    sizes, kinds = np.zeros((rows, 0), np.int32), np.zeros(rows, np.int64)
    return Plan(sizes, kinds, batch_size, seed, shard, 1, np.stack(runs, axis=1) if runs else None)


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
        accumulate: As for `preference_dataset`.
    """

    def __init__(
        self, system: CompoundSystem, records: Indexed[PreferenceRecord], settings: Settings, accumulate: int = 1
    ):
        self.system, self._records, self._settings, self._accumulate = system, records, settings, accumulate
        batch_size, _, shard, _ = settings
        check_batches(len(records), batch_size, shard)
        check_parts(batch_size, accumulate)
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
        known = self._rows
        rows, sizes = self.plan.at(step)
        own, whole = self._usable[rows], self._usable[self.plan.whole(step)[0]]
        found = [known.features(int(row)) for row in own]
        example = lambda name: known.example(name, int(own[0]))  # noqa: E731
        batch = pair_batch(self.system, found, dict(zip(known.axes, sizes, strict=True)), example)
        return in_rooms(batch, dict(zip(known.routed, known.runs[whole].T, strict=True)), self._accumulate)

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
        self.plan = Plan(rows.sizes[usable], rows.kinds[usable], *self._settings, rows.runs[usable])

    def _prepared(self, params: Params) -> Iterator[tuple[int, Prepared]]:
        found = ((number, self._record(number)) for number in range(len(self._records)))
        for number, row in prepare_in_groups(self.system, params, found, TOGETHER):
            if isinstance(row, RecordError):
                raise RecordError(f"record {number}, counted from 0: {row}") from row
            require_intermediates(self.system, row.held is not False)
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
    accumulate: int = 1,
) -> PreferenceBatches:
    """Endless batches for `Trainer.fit`, read ahead of the step: that of step k is a pure function of k and arguments.

    Records are prepared once, into files: by `load_preferences` with the system, or here. What frozen parts encode is
    left to `Trainer.fit`, which knows their parameters, where `load_preferences` was not given them.
    Rows are shuffled anew every epoch by the seed; batches are made of rows of like sizes, in an order of their own,
    and padded to few static sizes. Each batch has about as many of the rows that take a branch of a switch, or have so
    many turns, as the others. Rows that do not fill a last batch are left out of that epoch.

    Args:
        system: What the records are prepared for.
        records: A list, what `load_preferences` returns, or anything with a length whose rows are found by number.
        batch_size: Rows of the global batch.
        seed: Of the order.
        shard: (index, count): this process gives the index-th of count equal blocks of its rows, see `batch_shard`.
        shapes: At most so many of batches, each compiled once; images of several sizes have at least one each. What
            does not run in every row is compiled for each of a few numbers of runs, too.
        accumulate: As for `epoch_batches`.

    Returns:
        The batches by step.

    Raises:
        RecordError: Names the record that cannot be used, counted from 0.
        ValueError: Fewer records than a batch, or a batch that count or accumulate does not divide.
    """
    return PreferenceBatches(system, records, (batch_size, seed, shard, shapes), accumulate)


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
