"""The input pipeline, on Grain: records that need not fit in memory, prepared in threads ahead of the step."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import grain

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.batches import check_batches
from sysdpo_jax.data.records import PreferenceRecord, prepare_pairs
from sysdpo_jax.graph import CompoundSystem, Known
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.user_code import is_users, name_of, user_code

T = TypeVar("T")

# Batches: read in so many threads, and so many ahead of the step.
THREADS = AHEAD = 4

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
        except Exception as error:
            numbers = [row for row, _ in rows]
            said = str(error) if isinstance(error, RecordError) else f"{type(error).__name__}: {error}"
            raise RecordError(f"the batch of the records {numbers}, counted from 0: {said}") from error

    used = len(records) // batch_size * batch_size
    rows = grain.MapDataset.source(_Numbered(records)).seed(seed).shuffle()[:used]
    # Blocks of a batch follow one another, so that this shard's are every count-th.
    blocks = rows.batch(batch_size // count, batch_fn=list)[index::count]
    return blocks.map(prepare).repeat()


@contextmanager
def read_ahead(dataset: grain.MapDataset[T], step: int) -> Iterator[Iterator[T]]:
    """An iterator over the elements from `step` on, which threads make ahead of it; they end with the context.

    Grain's own prefetching would wait, when it is left and when the process ends, for a thread whose record never comes
    (a tool that waits for a server); here the threads are left alone after a moment.
    """
    with DaemonExecutor(THREADS, "read-ahead") as threads:
        yield _elements(dataset, step, threads)


def _elements(dataset: grain.MapDataset[T], step: int, threads: Executor) -> Iterator[T]:
    ahead: deque[Future[T]] = deque()
    for last in range(step, len(dataset)):
        ahead.append(threads.submit(dataset.__getitem__, last))
        if len(ahead) > AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


class _Numbered:
    """The records with their numbers, for messages."""

    def __init__(self, records: RecordSource):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> tuple[int, PreferenceRecord]:
        records = f"{name_of(self._records)}.__getitem__" if is_users(self._records) else "reading"
        with user_code(f"{records}, for record {row}, counted from 0,", RecordError, (RecordError,)):
            return row, self._records[row]
