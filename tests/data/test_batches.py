"""Batches of prepared preferences: their order and shapes, shards, what is read and when, and training from them."""

import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import grain
import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, Gaussian, PreferenceRecord, RecordError, epoch_batches, prepare_pairs
from sysdpo_jax.data import batches, preference_dataset
from sysdpo_jax.data.batches import AHEAD, MOST_AHEAD, read_ahead
from sysdpo_jax.data.plan import MULTIPLE, Plan, best_cut, static_sizes
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


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_the_blocks_of_the_global_batch(count):
    whole = preference_dataset(CHAIN, RECORDS, BATCH, seed=5)
    shards = [preference_dataset(CHAIN, RECORDS, BATCH, seed=5, shard=(index, count)) for index in range(count)]
    for step in range(PER_EPOCH + 1):
        parts = [shard[step] for shard in shards]
        same(jax.tree.map(lambda *blocks: np.concatenate(blocks), *parts), whole[step])


def test_records_are_read_and_prepared_once():
    source = Recording()
    dataset = preference_dataset(CHAIN, source, BATCH, seed=5)
    assert source.rows == list(range(ROWS))
    assert Counter(chain(*(rows_of(dataset[step]) for step in range(4 * PER_EPOCH)))).keys() == set(range(ROWS))
    assert len(source.rows) == ROWS


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
    with pytest.raises(RecordError, match="record 3, counted from 0: chosen lacks the field 'c': add it"):
        preference_dataset(CHAIN, records, BATCH, seed=5)


def test_making_batches_goes_ahead_in_threads_and_starts_at_any_step():
    asked, threads = [], set()

    class Watched:
        def __len__(self):
            return 100

        def __getitem__(self, step):
            asked.append(step)
            threads.add(threading.current_thread().name)
            return step

    with read_ahead(Watched(), 3) as batches:
        assert next(batches) == 3
        deadline = time.monotonic() + 10
        while len(asked) < 1 + AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(asked) == list(range(3, 4 + AHEAD))
        assert next(batches) == 4
    assert all(name.startswith("read-ahead") for name in threads)
    assert threads_left() == []


class SlowDisk:
    """Sleeps as long for a batch as the steps that are given take."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, number):
        time.sleep(self.seconds)
        return number


@pytest.mark.parametrize("steps_a_read", [3, 10])
def test_a_slow_disk_starves_no_step(steps_a_read):
    """After the first steps, those that follow wait under 2% of the time for batches.

    Everything sleeps. A busy machine adds to what is measured and takes nothing away: of three times the best counts.
    """
    step, warm, measured = 0.02, 60, 60
    shares = []
    while not shares or (shares[-1] >= 0.02 and len(shares) < 3):
        with read_ahead(SlowDisk(steps_a_read * step), 0) as batches:
            waited = began = 0.0
            for number in range(warm + measured):
                asked = time.monotonic()
                if number == warm:
                    began, waited = asked, 0.0
                assert next(batches) == number
                waited += time.monotonic() - asked
                time.sleep(step)
        shares.append(waited / (time.monotonic() - began))
    assert min(shares) < 0.02, shares


def test_no_more_is_read_ahead_than_is_needed():
    """A reader that keeps up fills no memory, and one that never does has a bound."""
    asked, there, changed = [], [-1], threading.Condition()

    class Reads:
        def __len__(self):
            return sys.maxsize

        def __getitem__(self, number):
            asked.append(number)
            with changed:
                changed.wait_for(lambda: number <= there[0])
            return number

    def come(last):
        with changed:
            there[0] = last
            changed.notify_all()

    with read_ahead(Reads(), 0) as batches:
        for number in range(30):
            threading.Timer(0.05 if number == 0 else 0.0, come, (number + 20,)).start()
            time.sleep(0.02)
            assert next(batches) == number
            # One more than at first for the batch of the first step, which nobody could have read before.
            assert max(asked) <= number + AHEAD + 1
        for number in range(50, 90):
            threading.Timer(0.01, come, (number,)).start()
            while next(batches) < number:
                pass
            assert max(asked) <= number + MOST_AHEAD
        assert max(asked) > number + AHEAD + 1
        come(sys.maxsize)


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
    message = rf"Failing.__getitem__, for record 3, counted from 0, failed \({said}\)"
    with pytest.raises(RecordError, match=message):
        preference_dataset(CHAIN, Failing(error=error), BATCH, seed=5)


def test_what_a_component_raises_is_an_error_of_the_record(monkeypatch):
    def broken(self, values, parents):
        if values[0][0] == RECORDS[7].chosen["a"][0]:
            raise ZeroDivisionError("by nothing")
        return prepare(self, values, parents)

    prepare = Gaussian.prepare
    monkeypatch.setattr(Gaussian, "prepare", broken)
    monkeypatch.setattr(batches, "TOGETHER", 1)
    with pytest.raises(RecordError, match="record 7, counted from 0: chosen, node 'a': ZeroDivisionError: by nothing"):
        preference_dataset(CHAIN, RECORDS, BATCH, seed=5)


def test_a_record_that_never_comes_holds_up_nobody():
    come = threading.Event()
    dataset = grain.MapDataset.range(8).map(lambda k: come.wait() if k == 1 else k)
    began = time.monotonic()
    with read_ahead(dataset, 0) as batches:
        assert next(batches) == 0
    assert GRACE - 0.1 <= time.monotonic() - began < GRACE + 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name in threads_left())
    come.set()


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
    fit(tmp_path, preference_dataset(CHAIN, RECORDS, BATCH, seed=5), 4)
    same(fit(tmp_path, preference_dataset(CHAIN, RECORDS, BATCH, seed=5), 9), whole)
    assert threads_left() == []


def test_a_dataset_that_is_too_short_is_refused(tmp_path):
    short = grain.MapDataset.range(7)
    with pytest.raises(ValueError, match="the dataset ends after 7 of the 9 steps: repeat it"):
        fit(tmp_path, short, 9)


def sizes_of(seed, rows=300, kinds=1):
    """Two clusters of sizes, of rows that are of so many kinds."""
    random = np.random.default_rng(seed)
    small, large = random.integers(1, 9, (rows, 2)), random.integers(30, 41, (rows, 2))
    return np.where(random.random((rows, 1)) < 0.5, small, large), random.integers(0, kinds, rows)


def test_static_sizes_are_those_of_the_clusters():
    """With room for two, one of which is the largest of all: nothing but rounding is padded."""
    sizes, _ = sizes_of(0)
    np.testing.assert_array_equal(static_sizes(sizes, 2, 4), [[8, 8], [40, 40]])
    np.testing.assert_array_equal(static_sizes(sizes, 1, 4), [[40, 40]])
    # More than that cuts the rows where it saves, never below a batch, and every row still fits.
    for number in (4, 8):
        found = static_sizes(sizes, number, 4)
        assert len(found) <= number
        assert all((sizes <= shape).all(1).sum() >= 4 for shape in found)
        assert (found % MULTIPLE == 0).all()
        np.testing.assert_array_equal(found[-1], [40, 40])


def test_the_best_cut_is_that_of_all_cuts():
    """Against every cut of every axis, by its definition."""
    sizes, up = np.random.default_rng(3).integers(1, 60, (40, 3)), lambda n: -(-n // MULTIPLE) * MULTIPLE
    places = lambda rows: len(rows) * up(rows.max(0)).sum()  # noqa: E731
    best = max(
        places(sizes) - places(sizes[sizes[:, axis] <= limit]) - places(sizes[sizes[:, axis] > limit])
        for axis in range(3)
        for limit in np.unique(sizes[:, axis])[:-1]
        if min((sizes[:, axis] <= limit).sum(), (sizes[:, axis] > limit).sum()) >= 5
    )
    saved, axis, limit = best_cut(sizes, 5)
    assert (
        saved == best == places(sizes) - places(sizes[sizes[:, axis] <= limit]) - places(sizes[sizes[:, axis] > limit])
    )


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("shapes", [1, 3, 8])
def test_batches_hold_rows_that_fit_and_an_epoch_holds_each_once(kinds, shapes):
    sizes, kind = sizes_of(1, kinds=kinds)
    plan = Plan(sizes, kind, 8, seed=2, shard=(0, 1), shapes=shapes)
    assert plan.per_epoch == sum(np.bincount(kind) // 8)
    epochs = [[plan.at(epoch * plan.per_epoch + place) for place in range(plan.per_epoch)] for epoch in range(2)]
    for rows, shape in chain(*epochs):
        assert (sizes[rows] <= shape).all()
        assert len(set(kind[rows].tolist())) == 1
    for epoch in epochs:
        rows = np.concatenate([rows for rows, _ in epoch])
        assert len(set(rows.tolist())) == len(rows) == 8 * plan.per_epoch
    assert len({shape for _, shape in chain(*epochs)}) <= max(shapes, kinds)
    # Another epoch has other batches, and another order of their sizes.
    orders = [[shape for _, shape in epoch] for epoch in epochs]
    assert (orders[0] != orders[1]) == (shapes // kinds > 1)
    assert [rows.tolist() for rows, _ in epochs[0]] != [rows.tolist() for rows, _ in epochs[1]]


def test_a_plan_is_a_function_of_the_step_and_shards_have_its_shapes():
    sizes, kind = sizes_of(4, kinds=2)
    whole = Plan(sizes, kind, 8, 2, (0, 1), 8)
    halves = [Plan(sizes, kind, 8, 2, (index, 2), 8) for index in range(2)]
    for step in (100, 3, 0, 41):
        rows, shape = whole.at(step)
        parts = [half.at(step) for half in halves]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), rows)
        assert all(own == shape for _, own in parts)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_with_the_same_runs_are_spread_over_batches_and_parts(parts):
    """Each group of rows with the same runs differs by one at most, and the sizes are those without any runs."""
    sizes, kind = sizes_of(4, kinds=2)
    runs = np.random.default_rng(0).choice([[0, 2], [1, 1], [2, 0]], len(kind))
    plan, other = (Plan(sizes, kind, 8, 2, (0, 1), 8, given) for given in (runs, None))
    for epoch in range(2):
        own, bare = ([each.at(epoch * plan.per_epoch + at) for at in range(plan.per_epoch)] for each in (plan, other))
        assert len({int(row) for rows, _ in own for row in rows}) == 8 * plan.per_epoch
        assert all((sizes[rows] <= shape).all() for rows, shape in own)
        assert sorted(np.unique(kind[rows]).tolist() for rows, _ in own) == sorted(
            np.unique(kind[rows]).tolist() for rows, _ in bare
        )
    whole = Plan(sizes, np.zeros(len(kind), int), 8, 2, (0, 1), 1, runs)
    for ways in np.unique(runs, axis=0):
        counts = [(runs[whole.at(step)[0][part::parts]] == ways).all(1).sum()
                  for step in range(whole.per_epoch) for part in range(parts)]  # fmt: skip
        assert max(counts) - min(counts) <= 1 + (parts > 1)


def test_rows_of_like_sizes_come_together():
    """The share of places that are padding, against that of batches of any rows padded to the largest size."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(np.log([40, 30]), 0.8, (2000, 2)), 4, 128).astype(int)
    plan = Plan(sizes, np.zeros(2000, int), 8, 0, (0, 1), 8)
    made = [plan.at(step) for step in range(plan.per_epoch)]
    used = sum(sizes[rows].sum() for rows, _ in made)
    assert used / sum(8 * sum(shape) for _, shape in made) > 0.6
    assert used / (8 * len(made) * sizes.max(0).sum()) < 0.4
