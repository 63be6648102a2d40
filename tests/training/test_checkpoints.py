"""Checkpoints: which are kept, what is done about damaged ones, and that other errors are not taken for damage."""

import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import Categorical, CompoundSystem, Gaussian, Node
from sysdpo_jax.manifest import CheckpointMismatchError, describe, differences, fingerprints
from sysdpo_jax.training import FROZEN, Checkpoints, ComponentOptimizer, create_state, make_optimizer
from sysdpo_jax.training.checkpoints import CorruptCheckpointError

SYSTEM = CompoundSystem(("x",), (Node("a", Gaussian(64, 32), ("x",)), Node("b", Gaussian(1, 64), ("a",))))
OPTIMIZER = make_optimizer({"a": ComponentOptimizer(optax.adam(0.1)), "b": FROZEN}, ema_decay=0.9)
CONFIG = {"name": "value"}
# A read that Orbax gave up leaves a coroutine with the same error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(step):
    """A state whose numbers depend on the step."""
    state = create_state(SYSTEM, SYSTEM.init(jax.random.key(0)), OPTIMIZER)
    return state.after(jax.tree.map(lambda x: x + step, state.mutable))


def opened(directory, config=CONFIG, **settings):
    return Checkpoints(directory, state_of(0), config, **settings)


def saved(directory, steps, metrics=(), **settings):
    with opened(directory, **settings) as checkpoints:
        for step, metric in zip(steps, metrics or [None] * len(steps), strict=True):
            checkpoints.save(state_of(step), metric)


def restore(directory):
    with opened(directory) as checkpoints:
        return checkpoints.restore(state_of(0))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_who_only_reads_changes_nothing_and_compares_what_it_knows(tmp_path):
    """Beside a run that is saving: what is partial is not set aside, what is temporary not removed."""
    saved(tmp_path, [1, 2], config={"name": "value", "batches": "searched"})
    writing = tmp_path / "3.orbax-checkpoint-tmp-0"
    writing.mkdir()
    (tmp_path / "4" / "state").mkdir(parents=True)
    before = names(tmp_path)
    with opened(tmp_path, read_only=True) as checkpoints:
        same(checkpoints.restore(state_of(0), 2), state_of(2))
        with pytest.raises(CorruptCheckpointError, match="4 cannot be read"):
            checkpoints.restore(state_of(0), 4)
    assert names(tmp_path) == before
    with (
        opened(tmp_path, read_only=True, config={"name": "other"}) as checkpoints,
        pytest.raises(
            CheckpointMismatchError,
            match=r"configuration\.name was value, now other\): choose",
        ),
    ):
        checkpoints.restore(state_of(0), 2)
    with pytest.raises(FileNotFoundError, match="the run has saved nothing yet"):
        opened(tmp_path / "none", read_only=True)


@pytest.mark.parametrize(("mode", "best", "kept"), [("max", 2, [2, 4, 5]), ("min", 3, [3, 4, 5])])
def test_the_newest_and_the_best_are_kept(tmp_path, mode, best, kept):
    saved(tmp_path, range(1, 6), [0.5, 0.9, 0.1, 0.2, float("nan")], best=("reward", mode))
    assert names(tmp_path) == [str(step) for step in kept]
    with opened(tmp_path, best=("reward", mode)) as checkpoints:
        assert (checkpoints.latest, checkpoints.best, checkpoints.oldest) == (5, best, 4)
        same(checkpoints.restore(state_of(0), checkpoints.best), state_of(best))
        # One that is better takes its place, the newest stay.
        checkpoints.save(state_of(6), 1.0 if mode == "max" else 0.0)
        assert checkpoints.best == 6
    assert names(tmp_path) == ["5", "6"]


def test_another_metric_is_not_compared_with_the_one_before(tmp_path):
    saved(tmp_path, [1, 2], [5.0, 4.0], best=("old", "max"))
    with opened(tmp_path, best=("new", "max")) as checkpoints:
        checkpoints.save(state_of(3), -1.0)
        assert checkpoints.best == 3
    with pytest.raises(ValueError, match="keep 0 must be at least 1"):
        opened(tmp_path, keep=0)


def largest(path):
    """The file with an array's numbers: Orbax keeps short arrays and indices in others."""
    files = [file for file in (path / "state").rglob("*") if file.is_file() and file.parent.name == "d"]
    return max(files, key=lambda file: file.stat().st_size)


def cut(path):
    file = largest(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path):
    """Random numbers do not compress: the bits are those of a number, and no format notices."""
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 255
    largest(path).write_bytes(content)


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGES = {
    "a file cut short": (cut, "cannot be read: "),
    "bits flipped": (flip, r"the array (trained|ema)/a/kernel is not the one that was saved|cannot be read"),
    "no manifest": (lambda path: (path / "state/manifest.ocdbt").unlink(), "cannot be read: "),
    "no arrays": (lambda path: shutil.rmtree(path / "state"), "its folder state is missing"),
    "no metadata": (lambda path: (path / "about/metadata").unlink(), "its file about/metadata is missing"),
    "half the metadata": (lambda path: (path / "about/metadata").write_text('{"a'), "metadata is not JSON"),
    "half the metric": (lambda path: (path / "metrics/metrics").write_text('{"a'), "metrics is not JSON"),
    "nothing": (empty, "its folder state is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, name):
    damage, reason = DAMAGES[name]
    saved(tmp_path, [1, 2, 3], [0.1, 0.2, 0.3], best=("reward", "max"))
    damage(tmp_path / "3")
    with pytest.warns(UserWarning, match=rf"{tmp_path / '3'} cannot be used and is now .*3\.corrupt-1: .*({reason})"):
        restored = restore(tmp_path)
    same(restored, state_of(2))
    assert names(tmp_path) == ["2", "3.corrupt-1"]


def test_the_same_step_can_be_saved_and_damaged_again(tmp_path):
    saved(tmp_path, [1])
    for number in (1, 2):
        saved(tmp_path, [3])
        empty(tmp_path / "3")
        with pytest.warns(UserWarning, match=rf"3\.corrupt-{number}"):
            same(restore(tmp_path), state_of(1))
    with opened(tmp_path) as checkpoints:
        assert [path.name for path in checkpoints.set_aside] == ["3.corrupt-1", "3.corrupt-2"]


def test_runs_side_by_side_in_threads_save_at_the_same_time(tmp_path):
    """As seeds do: each save is whole, and none waits for another's signs, which would take five minutes."""
    together, steps = threading.Barrier(3), range(1, 9)

    def run(name):
        with opened(tmp_path / name) as checkpoints:
            for step in steps:
                together.wait(60)
                checkpoints.save(state_of(step))

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for name in "abc":
        same(restore(tmp_path / name), state_of(steps[-1]))


def test_a_deletion_that_was_killed_is_finished(tmp_path):
    """An older one than those that are kept: nobody would have read it again."""
    saved(tmp_path, [1, 2, 3])
    (tmp_path / "1" / "state").mkdir(parents=True)
    same(restore(tmp_path), state_of(3))
    assert names(tmp_path) == ["2", "3"]


def test_when_none_is_left_it_is_an_error_every_time(tmp_path):
    saved(tmp_path, [1, 2])
    for step in ("1", "2"):
        cut(tmp_path / step)
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError, match="no checkpoint that can be used, 2, 1 are damaged"):
            restore(tmp_path)
    # What no reading confirms may be an error of the reading: all stay where they are.
    assert names(tmp_path) == ["1", "2"]
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        restore(tmp_path / "new")


def test_an_asked_for_step_that_is_damaged_is_an_error_and_stays(tmp_path):
    saved(tmp_path, [1, 2])
    cut(tmp_path / "2")
    with opened(tmp_path) as checkpoints:
        with pytest.raises(CorruptCheckpointError, match=f"{tmp_path / '2'} cannot be read"):
            checkpoints.restore(state_of(0), 2)
        same(checkpoints.restore(state_of(0), 1), state_of(1))
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError("no right to read"), RuntimeError("device lost")])
def test_other_errors_are_no_damage(tmp_path, monkeypatch, error):
    saved(tmp_path, [1, 2])

    def fail(*args, **kwargs):
        raise error

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(type(error)):
            checkpoints.restore(state_of(0))
    assert names(tmp_path) == ["1", "2"]


def test_a_save_that_was_killed_leaves_nothing_that_counts(tmp_path):
    saved(tmp_path, [1])
    half = tmp_path / "2.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / "1", half)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(state_of(2))
    assert names(tmp_path) == ["1", "2"]


def test_a_reference_that_is_gone_has_no_fingerprint(tmp_path):
    """Precomputed references are None in the state; the other trees are compared as ever."""
    state = state_of(1)
    gone = state._replace(reference=dict.fromkeys(state.reference))
    for given in (state, gone):
        with Checkpoints(tmp_path / str(given is gone), given, CONFIG) as checkpoints:
            checkpoints.save(given)
            same(checkpoints.restore(given), given)
    assert fingerprints(gone.reference) == {}
    assert Path(tmp_path / "True" / "1").is_dir()


def test_differences_are_named_by_field():
    node = describe("node a", Node("a", Gaussian(3, 2), ("x",)))
    warmer = describe("node a", Node("a", Gaussian(3, 2, 4.0), ("x",)))
    assert differences(node, node) == []
    assert differences(node, warmer) == ["node a.component.scale was 1.0, now 4.0"]
    other = describe("node a", Node("a", Categorical(3, (2,)), ("x",)))
    assert differences(node, other) == ["node a.component was Gaussian, now Categorical"]
    assert describe("rates", {"b": (1, None), "a": [{"x": 0.5}]}) == {
        "rates": "2 values",
        "rates.b": "(1, None)",
        "rates.a": "1 values",
        "rates.a.0": "1 values",
        "rates.a.0.x": "0.5",
    }
