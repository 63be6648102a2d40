"""What a run says and leaves where a disk is full, a batch or an evaluation never comes, or its folder is another's."""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, SamplingObjective, epoch_batches
from sysdpo_jax.io import InUseError
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    Evaluation,
    NonFiniteError,
    Trainer,
    create_state,
    make_optimizer,
    read_metrics,
)
from sysdpo_jax.training.checkpoints import CheckpointWriteError
from sysdpo_jax.training.metrics import MetricsLog, MetricsWriteError
from sysdpo_jax.training.preemption import PATIENCE, Preempted
from tests.test_io_locks import held
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(3)
OPTIMIZER = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN, "c": FROZEN})
BATCH_AT = epoch_batches(pairs(40), 8, seed=1)


def fit(directory, steps=6, batch_at=BATCH_AT, accepted=None, resume=True, **settings):
    state = create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)
    objective = settings.pop("objective", DirectObjective())
    trainer = Trainer(CHAIN, objective, OPTIMIZER, directory, **settings)
    return trainer.fit(state, batch_at, steps, KEY, resume, accepted)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


def steps_of(directory):
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


class Full:
    """A file that takes `room` bytes more."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        taken = self._file.write(data[: self._room])
        self._room -= taken
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken


@pytest.fixture
def full_after(monkeypatch):
    """metrics.jsonl takes so many bytes."""

    def arrange(room):
        opened = Path.open

        def limited(self, *args, **settings):
            file = opened(self, *args, **settings)
            return Full(file, room) if self.name == "metrics.jsonl" and "a" in args[0] else file

        monkeypatch.setattr(Path, "open", limited)

    return arrange


def test_rows_that_find_no_room_end_the_run_with_its_state_and_no_half_row(tmp_path, full_after, monkeypatch):
    full_after(3000)
    with pytest.raises(MetricsWriteError, match=r"metrics\.jsonl does not take the row of step") as caught:
        fit(tmp_path / "hurt")
    monkeypatch.undo()
    assert "(No space left on device): make room for it" in str(caught.value)
    lost = len(steps_of(tmp_path / "hurt"))
    assert 0 < lost < 5
    assert f"step {lost}, which will be missing" in str(caught.value)
    assert (tmp_path / "hurt" / "metrics.jsonl").read_bytes().endswith(b"}\n")
    [newest] = saved(tmp_path / "hurt")
    assert newest > lost
    same(fit(tmp_path / "hurt"), fit(tmp_path / "whole"))


def test_a_row_is_written_when_it_is_made(tmp_path):
    """Whoever follows the file sees it, and a kill loses none."""
    with MetricsLog(tmp_path, 0) as log:
        log.write(0, {"loss": 1.0})
        assert steps_of(tmp_path) == [0]


def no_room(*args, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_that_is_refused_is_named_and_the_one_before_it_stays(tmp_path, monkeypatch, capsys):
    fit(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", no_room)
        with pytest.raises(CheckpointWriteError) as caught:
            fit(tmp_path, 6, checkpoint_every=2)
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoints'} does not take the checkpoint of step 4 ([Errno 28] No space left on device); the "
        "newest is 2: make room for it, then give the same command again"
    )
    assert "warning: the state of step 4 is not saved: " in capsys.readouterr().err
    assert saved(tmp_path) == [2]
    assert int(fit(tmp_path, 6).step) == 6


def test_a_background_write_that_fails_is_told_at_the_next_save_and_the_state_is_saved_then(tmp_path, monkeypatch):
    waits, wait = [], __import__("orbax.checkpoint").checkpoint.CheckpointManager.wait_until_finished

    def fails_once(self):
        wait(self)
        if self.all_steps() and not waits:
            waits.append(1)
            raise ValueError("OUT_OF_RANGE: Failed writing\nmore")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", fails_once)
    with pytest.raises(CheckpointWriteError, match=r"the checkpoint of step 2 \(OUT_OF_RANGE: Failed writing\)"):
        fit(tmp_path, 6, checkpoint_every=2)
    assert 4 in saved(tmp_path)


def test_what_stopped_the_run_is_said_even_where_nothing_can_be_saved(tmp_path, monkeypatch, capsys):
    def batch_at(step):
        if step == 2:
            raise KeyError("the data's own fault")
        return BATCH_AT(step)

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", no_room)
    with pytest.raises(KeyError, match="the data's own fault"):
        fit(tmp_path, 4, batch_at)
    assert "warning: the state of step 2 is not saved" in capsys.readouterr().err


def test_a_state_that_is_not_saved_is_not_said_to_be(tmp_path, monkeypatch):
    def batch_at(step):
        batch = BATCH_AT(step)
        if step == 1:
            batch.rejected["a"]["value"][2] = np.nan
        return batch

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", no_room)
    with pytest.raises(NonFiniteError, match=r"step 1 met .* the state before it could not be saved: look") as caught:
        fit(tmp_path, 4, batch_at)
    assert (caught.value.step, caught.value.nodes) == (1, ("a",))


class Hanging:
    """Asks this process to stop, the first time, and never comes back until the test is over."""

    def __init__(self, number):
        self.number, self.over, self.first = number, threading.Event(), threading.Semaphore(1)

    def __call__(self, *args):
        if self.first.acquire(blocking=False):
            os.kill(os.getpid(), self.number)
        self.over.wait(60)
        return {"x": 1.0}


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def hanging(request):
    call = Hanging(request.param)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield call
    call.over.set()
    signal.signal(signal.SIGINT, before)


def stopped(hanging, directory, **settings):
    began = time.monotonic()
    kind = Preempted if hanging.number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        fit(directory, **settings)
    assert time.monotonic() - began < PATIENCE + 20
    assert not hanging.over.is_set()
    return str(caught.value)


def test_a_batch_that_never_comes_does_not_hold_up_a_stop(tmp_path, hanging):
    said = stopped(hanging, tmp_path, batch_at=lambda step: BATCH_AT(step) if step < 3 else hanging())
    assert said.startswith("asked to stop: step 3 is saved")
    assert saved(tmp_path) == [3]
    same(fit(tmp_path, 6), fit(tmp_path / "whole", 6))


def test_nor_does_one_that_a_thread_reads_ahead(tmp_path, hanging):
    dataset = grain.MapDataset.range(20).map(lambda step: BATCH_AT(step) if step < 3 else hanging())
    assert stopped(hanging, tmp_path, batch_at=dataset).startswith("asked to stop: step ")
    [newest] = saved(tmp_path)
    # The signal comes as early as the thread reads.
    assert newest <= 3
    assert steps_of(tmp_path) == list(range(newest))


def test_nor_does_an_evaluation(tmp_path, hanging):
    evaluation = Evaluation(lambda step, params: hanging() if step == 4 else {"x": 1.0}, 2)
    said = stopped(hanging, tmp_path, evaluation=evaluation)
    assert said.startswith("asked to stop: step 4 is saved")
    # It is made when the run goes on.
    measured = []
    fit(tmp_path, 6, evaluation=Evaluation(lambda step, params: measured.append(step) or {"x": 1.0}, 2))
    assert measured == [4, 6]


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path):
    with held("locked_folder", tmp_path) as process:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(InUseError, match=f"{tmp_path} is in use by process {process.pid} on host"):
            fit(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    fit(tmp_path, 2)
    assert not (tmp_path / ".lock").exists()


def test_a_run_is_accepted_once_nothing_can_refuse_it(tmp_path):
    calls = []
    accepted = lambda: calls.append(sorted(path.name for path in tmp_path.iterdir()))  # noqa: E731
    fit(tmp_path, 2, accepted=accepted)
    assert calls == [[".lock", ".lock.json", "checkpoints"]]
    for settings, error in (
        ({"resume": False}, "holds a checkpoint: resume"),
        ({"steps": 1}, "holds step 2, which is not between"),
        ({"config": {"data": "other"}}, "is of another run .*config data"),
        ({"best": ("eval/x", "max")}, "give the Trainer one"),
        ({"batch_at": grain.MapDataset.range(3)}, "the dataset ends after 3 of the 6 steps"),
    ):
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises((ValueError, FileExistsError), match=error):
            fit(tmp_path, accepted=accepted, **settings)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(calls) == 1
    with pytest.raises(ValueError, match="the dataset ends after 3"):
        fit(tmp_path / "new", batch_at=grain.MapDataset.range(3))
    assert not (tmp_path / "new").exists()


def test_sys_exit_of_a_batch_is_a_failure_whose_state_is_saved(tmp_path):
    """It must not end the process with a code of its own."""

    def batch_at(step):
        if step == 2:
            sys.exit(7)
        return BATCH_AT(step)

    with pytest.raises(RuntimeError, match=r"the batch of step 2 failed .sys.exit.7.."):
        fit(tmp_path, 4, batch_at)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def broken(step):
    raise KeyError("the data's own fault")


UNFIT = {
    "parts": ({"accumulate": 3}, "8 rows cannot be cut into 3 equal parts"),
    "sft": (
        {"objective": DirectObjective(sft=(("b", 0.1),))},
        "sft names the node 'b', which is not a trained node",
    ),
    "best": ({"best": ("rewards/none", "max")}, "the step has no metric 'rewards/none', choose one of .*finite"),
    "batch of another objective": ({"objective": SamplingObjective()}, "SampledBatch"),
    "data": ({"batch_at": broken}, "the data's own fault"),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_a_step_would_refuse_is_refused_before_anything_is_written(tmp_path, unfit):
    settings, said = UNFIT[unfit]
    called, run = [], tmp_path / "run"
    evaluation = Evaluation(lambda step, params: called.append(step) or {"x": 1.0}, 2)
    refused = {"accepted": lambda: called.append("accepted"), "evaluation": evaluation, **settings}
    with pytest.raises((ValueError, KeyError, TypeError), match=said):
        fit(tmp_path / "new" / "run", **refused)
    assert not (tmp_path / "new").exists()
    fit(run, 2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    # A run that goes on is asked the same where it stands.
    with pytest.raises((ValueError, KeyError, TypeError)):
        fit(run, **refused)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert called == []


class Counting(DirectObjective):
    """Counts how often it is traced."""

    traced = 0

    def __call__(self, *args):
        type(self).traced += 1
        return super().__call__(*args)


def test_looking_at_the_step_first_costs_no_second_trace_and_no_second_batch(tmp_path):
    made = []
    fit(tmp_path, 3, lambda step: made.append(step) or BATCH_AT(step), objective=Counting())
    assert Counting.traced == 1
    assert made == [0, 1, 2]
    # A finished run needs no batch.
    fit(tmp_path, 3, broken, objective=Counting())
