"""The Grain dataset: the order of records, shards, what is read and when, and training from it."""

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain, islice

import grain
import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, PreferenceRecord, RecordError, epoch_batches, prepare_pairs
from sysdpo_jax.data import preference_dataset
from sysdpo_jax.data.pipeline import AHEAD, read_ahead
from sysdpo_jax.threads import GRACE
from sysdpo_jax.training import ComponentOptimizer, Trainer, create_state, make_optimizer
from tests.training.systems import CHAIN

ROWS, BATCH = 22, 4
PER_EPOCH = ROWS // BATCH
KEY = jax.random.key(3)
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(1e-2)) for name in ("a", "b", "c")})


def record(row):
    """One whose first input is its number."""
    rng = np.random.default_rng(row)
    side = lambda: {"a": rng.normal(size=3), "b": rng.normal(size=2), "c": rng.normal(size=1)}  # noqa: E731
    return PreferenceRecord({"x": np.array([row, 1.0])}, side(), side())


RECORDS = [record(row) for row in range(ROWS)]


@dataclass
class Recording:
    """A source that makes records when asked, and keeps what it was asked for and by which thread."""

    rows: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.rows.append(row)
        self.threads.add(threading.current_thread().name)
        return record(row)


def rows_of(batch):
    return batch.chosen["a"]["parents"][:, 0].astype(int).tolist()


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_element_is_its_records_prepared():
    batch = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)[7]
    same(batch, prepare_pairs(CHAIN, [RECORDS[row] for row in rows_of(batch)]))


def test_epochs_are_shuffled_and_a_last_batch_that_is_not_full_is_left_out():
    dataset = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    epochs = [[rows_of(dataset[epoch * PER_EPOCH + k]) for k in range(PER_EPOCH)] for epoch in range(3)]
    flat = [list(chain(*batches)) for batches in epochs]
    assert all(len(set(rows)) == PER_EPOCH * BATCH for rows in flat)
    assert flat[0] != flat[1] != flat[2]
    assert flat[0] != sorted(flat[0])
    # Other records are left out in other epochs.
    assert len({frozenset(rows) for rows in flat}) > 1


def test_an_element_depends_on_its_number_and_the_seed_alone():
    dataset, again = (preference_dataset(CHAIN, RECORDS, BATCH, seed=5) for _ in range(2))
    forwards = [rows_of(dataset[k]) for k in range(12)]
    assert [rows_of(again[k]) for k in reversed(range(12))] == forwards[::-1]
    # The next seed's epoch is not this one's next.
    other = preference_dataset(CHAIN, RECORDS, BATCH, seed=6)
    assert [rows_of(other[k]) for k in range(PER_EPOCH)] != forwards[PER_EPOCH : 2 * PER_EPOCH]
    assert rows_of(other[0]) != forwards[0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_are_the_blocks_of_the_global_batch_and_read_nothing_else(count):
    whole = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    sources = [Recording() for _ in range(count)]
    shards = [preference_dataset(CHAIN, s, BATCH, seed=5, shard=(i, count)) for i, s in enumerate(sources)]
    assert not any(source.rows for source in sources)
    for step in range(PER_EPOCH + 1):
        parts = [shard[step] for shard in shards]
        same(jax.tree.map(lambda *blocks: np.concatenate(blocks), *parts), whole[step])
    for index, source in enumerate(sources):
        expected = [rows_of(whole[k])[index * BATCH // count :][: BATCH // count] for k in range(PER_EPOCH + 1)]
        assert source.rows == list(chain(*expected))


@pytest.mark.parametrize("count", [2, 4])
def test_shards_of_epoch_batches_are_blocks_too(count):
    data = np.arange(ROWS)
    for step in range(PER_EPOCH + 1):
        parts = [epoch_batches(data, BATCH, 5, (index, count))(step) for index in range(count)]
        np.testing.assert_array_equal(np.concatenate(parts), epoch_batches(data, BATCH, 5)(step))


@pytest.mark.parametrize("make", [lambda **k: preference_dataset(CHAIN, RECORDS, seed=0, **k),
                                  lambda **k: epoch_batches(np.arange(ROWS), seed=0, **k)])  # fmt: skip
@pytest.mark.parametrize(
    ("batch_size", "shard", "message"),
    [
        (23, (0, 1), "22 rows do not fill one batch of 23"),
        (4, (0, 3), r"shard \(0, 3\) is no part of a batch of 4 rows"),
        (4, (2, 2), r"shard \(2, 2\) is no part of a batch"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, batch_size, shard, message):
    with pytest.raises(ValueError, match=message):
        make(batch_size=batch_size, shard=shard)


def test_a_bad_record_is_named_by_its_number():
    records = [*RECORDS[:3], PreferenceRecord({"x": [0.0, 0.0]}, {"a": [1.0]}, {}), *RECORDS[4:]]
    dataset = preference_dataset(CHAIN, records, BATCH, seed=5)
    bad = next(k for k in range(2 * PER_EPOCH) if 3 in rows_of(preference_dataset(CHAIN, RECORDS, BATCH, seed=5)[k]))
    with pytest.raises(RecordError, match=r"the batch of the records \[.*\b3\b.*\], counted from 0: record"):
        dataset[bad]


def test_reading_goes_ahead_in_threads_and_starts_at_any_step():
    source = Recording()
    dataset = preference_dataset(CHAIN, source, BATCH, seed=5)
    whole = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    with read_ahead(dataset, 3) as batches:
        same(next(batches), whole[3])
        ahead = 1 + AHEAD
        deadline = time.monotonic() + 10
        while len(source.rows) < ahead * BATCH and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(source.rows) == sorted(chain(*(rows_of(whole[k]) for k in range(3, 3 + ahead))))
        assert all(name.startswith("read-ahead") for name in source.threads)
        same(next(batches), whole[4])
    assert threads_left() == []


@dataclass
class Failing(Recording):
    """One of whose rows cannot be read."""

    error: BaseException = field(default_factory=OSError)

    def __getitem__(self, row):
        if row == 3:
            raise self.error
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("the disk is away"), "OSError: the disk is away"),
        (KeyError("x"), "KeyError: 'x'"),
        (StopIteration(), "StopIteration: "),
        (SystemExit(3), r"sys.exit\(3\)"),
    ],
)
def test_a_source_that_fails_is_named_by_the_record_whatever_it_raises(error, said):
    """StopIteration would end the data in silence, SystemExit the process."""
    dataset = preference_dataset(CHAIN, Failing(error=error), BATCH, seed=5)
    message = rf"Failing.__getitem__, for record 3, counted from 0, failed \({said}\)"
    with read_ahead(dataset, 0) as batches, pytest.raises(RecordError, match=message):
        deque(islice(batches, 2 * PER_EPOCH), maxlen=0)
    assert threads_left() == []


def test_what_a_component_raises_is_an_error_of_the_batch(monkeypatch):
    def broken(self, records, nodes=None, known=None):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(type(CHAIN), "prepare", broken)
    with pytest.raises(RecordError, match=r"the batch of the records \[.*\], counted from 0: ZeroDivisionError: by no"):
        preference_dataset(CHAIN, RECORDS, BATCH, seed=5)[0]


def test_a_record_that_never_comes_holds_up_nobody():
    come = threading.Event()
    dataset = grain.MapDataset.range(8).map(lambda k: come.wait() if k == 1 else k)
    began = time.monotonic()
    with read_ahead(dataset, 0) as batches:
        assert next(batches) == 0
    assert GRACE - 0.1 <= time.monotonic() - began < GRACE + 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name in threads_left())
    come.set()


def test_one_thread_prepares_at_a_time(monkeypatch):
    """Tokenizers of transformers change their own padding and truncation in every call."""
    inside, most, prepare = [], [], type(CHAIN).prepare

    def watched(self, records, nodes=None, known=None):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return prepare(self, records, nodes)

    monkeypatch.setattr(type(CHAIN), "prepare", watched)
    with read_ahead(preference_dataset(CHAIN, RECORDS, BATCH, seed=5), 0) as batches:
        for _ in range(8):
            next(batches)
    assert len(most) >= 16
    assert max(most) == 1


def fit(directory, batches, steps, every=100):
    state = create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)
    trainer = Trainer(CHAIN, DirectObjective(), OPTIMIZER, directory, checkpoint_every=every)
    return trainer.fit(state, batches, steps, KEY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Nine steps on a function that gives the dataset's elements."""
    dataset = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    return fit(tmp_path_factory.mktemp("whole"), lambda step: dataset[step], 9)


def test_training_from_the_dataset_is_training_from_its_elements_and_resumes(tmp_path, whole):
    dataset = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    fit(tmp_path, dataset, 4)
    source = Recording()
    same(fit(tmp_path, preference_dataset(CHAIN, source, BATCH, seed=5), 9), whole)
    # The second part read from step 4 on, and no further ahead than it may.
    last = 9 + AHEAD
    assert Counter(source.rows) <= Counter(chain(*(rows_of(dataset[k]) for k in range(4, last))))
    assert threads_left() == []


def test_a_record_that_cannot_be_prepared_ends_training_at_its_step(tmp_path, whole):
    dataset = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    row = rows_of(dataset[3])[0]
    records = [*RECORDS[:row], PreferenceRecord({"x": [0.0, 0.0]}, {"a": [1.0]}, {}), *RECORDS[row + 1 :]]
    with pytest.raises(RecordError, match=rf"the batch of the records \[{row}, "):
        fit(tmp_path, preference_dataset(CHAIN, records, BATCH, seed=5), 9)
    assert threads_left() == []
    # Mended, the run goes on from the state before that batch.
    assert (tmp_path / "checkpoints" / "3").is_dir()
    same(fit(tmp_path, dataset, 9), whole)


def test_a_dataset_that_is_too_short_is_refused(tmp_path):
    short = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)[:7]
    with pytest.raises(ValueError, match="the dataset ends after 7 of the 9 steps: repeat it"):
        fit(tmp_path, short, 9)
