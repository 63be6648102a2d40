"""The input pipeline, on Grain: records that need not fit in memory, prepared in threads ahead of the step."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import grain

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.batches import check_batches
from sysdpo_jax.data.records import PreferenceRecord, prepare_pairs
from sysdpo_jax.graph import CompoundSystem, Known
from sysdpo_jax.objectives.log_ratio import PairBatch
from sysdpo_jax.user_code import is_users, name_of, user_code

# Batches: read in so many threads, and so many ahead of the step.
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)

# Tokenizers keep their padding and truncation as state, so one thread prepares at a time; reading goes on beside it.
_PREPARING = threading.Lock()


@runtime_checkable
class RecordSource(Protocol):
    """Random access to records by number, such as a list of them, or a class that reads a file's row when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> PreferenceRecord: ...


def preference_dataset(
    system: CompoundSystem,
    records: RecordSource,
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset[PairBatch]:
    """An endless dataset whose element k is the batch of step k, a pure function of k and the arguments.

    Records are shuffled anew every epoch by the seed; those that do not fill a last batch are left out of it. They are
    read, and prepared as `prepare_pairs` does, when the batch is asked for and again in every epoch: nothing is kept
    but values of tools that the records lack, which `load_preferences` fills in.
    For records that fit in memory prepared, `epoch_batches(prepare_pairs(...))` prepares them once.
    batch_size: rows of the global batch. shard: (index, count) gives the index-th of count equal blocks of its rows, as
    `batch_shard(mesh)` says for this process; no other records are read.
    Raises `ValueError` for fewer records than a batch or a batch that count does not divide; an element raises
    `RecordError` naming the numbers of its records.
    """
    index, count = check_batches(len(records), batch_size, shard)
    known: Known = {}

    def prepare(rows: Sequence[tuple[int, PreferenceRecord]]) -> PairBatch:
        try:
            with _PREPARING:
                return prepare_pairs(system, [record for _, record in rows], known)
        except RecordError as error:
            numbers = [row for row, _ in rows]
            raise RecordError(f"the batch of the records {numbers}, counted from 0: {error}") from error

    used = len(records) // batch_size * batch_size
    rows = grain.MapDataset.source(_Numbered(records)).seed(seed).shuffle()[:used]
    # Blocks of a batch follow one another, so that this shard's are every count-th.
    blocks = rows.batch(batch_size // count, batch_fn=list)[index::count]
    return blocks.map(prepare).repeat()


@contextmanager
def read_ahead(dataset: grain.MapDataset[Any], step: int) -> Iterator[grain.DatasetIterator[Any]]:
    """An iterator over the elements from `step` on, which threads make ahead of it; they end with the context."""
    iterator = iter(dataset.to_iter_dataset(READ_AHEAD))
    try:
        iterator.set_state({"next_index": step})
        yield iterator
    finally:
        iterator.close()


class _Numbered:
    """The records with their numbers, for messages."""

    def __init__(self, records: RecordSource):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> tuple[int, PreferenceRecord]:
        if not is_users(self._records):
            return row, self._records[row]
        with user_code(f"{name_of(self._records)}.__getitem__, for the record {row},", RecordError, (RecordError,)):
            return row, self._records[row]
