"""TensorBoard and Weights & Biases: whatever becomes of them, training goes on and ends, and metrics.jsonl is whole."""

import errno
import os
import struct
import sys
import threading
import time
from types import SimpleNamespace

import jax
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    MetricsLog,
    Trainer,
    create_state,
    make_optimizer,
    read_metrics,
)
from sysdpo_jax.training.side_outputs import Events
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(3)
OPTIMIZER = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN, "c": FROZEN})


def fit(directory, steps=4, **settings):
    state = create_state(CHAIN, CHAIN.init(KEY), OPTIMIZER)
    trainer = Trainer(CHAIN, DirectObjective(), OPTIMIZER, directory, **settings)
    return trainer.fit(state, epoch_batches(pairs(16), 8, seed=0), steps, KEY)


def steps_of(directory):
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def events_of(directory):
    """The events of a folder's file: each is its length, a checksum, itself and a checksum."""
    [path] = directory.glob("events.out.tfevents.*")
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    return found


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_holds_what_tensorboard_shows(tmp_path):
    events = Events(tmp_path, purge=7)
    events.scalars({"loss": 0.5, "rewards/margins": float("nan")}, 7)
    events.text("warnings", "look", 8)
    events.flush()
    version, start, loss, margins, text = events_of(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, 1)
    assert [(e.step, e.summary.value[0].tag) for e in (loss, margins)] == [(7, "loss"), (7, "rewards/margins")]
    assert loss.summary.value[0].simple_value == 0.5
    assert abs(loss.wall_time - time.time()) < 60
    assert (text.step, text.summary.value[0].tensor.string_val[0]) == (8, b"look")
    events.close()


def test_nothing_of_tensorboard_runs_in_the_background(tmp_path):
    before = threading.active_count()
    events = Events(tmp_path, 0)
    events.scalars({"loss": 1.0}, 0)
    assert threading.active_count() == before
    events.close()


@pytest.mark.parametrize("where", ["__init__", "write", "flush", "close"])
def test_events_that_cannot_be_written_end_with_one_warning(tmp_path, monkeypatch, capsys, where):
    method = getattr(RecordWriter, where)

    def fails(self, *args):
        if where == "close":
            method(self)
        full()

    monkeypatch.setattr(RecordWriter, where, fails)
    fit(tmp_path, 4, checkpoint_every=2)
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    said = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert said == [
        f"warning: {tmp_path}: TensorBoard's events cannot be written ([Errno 28] No space left on device) and end "
        "here; metrics.jsonl goes on"
    ]


class Wandb:
    """A stand-in for the module, one of whose calls fails or never returns."""

    def __init__(self, broken, how):
        self.broken, self.how, self.calls = broken, how, []

    def call(self, name):
        self.calls.append(name)
        if name == self.broken:
            self.how()

    def init(self, **settings):
        self.call("init")
        return SimpleNamespace(
            define_metric=lambda *args, **settings: self.call("define_metric"),
            log=lambda row: self.call("log"),
            finish=lambda exit_code: self.call("finish"),
        )


def no_network():
    raise ConnectionError("no network")


def gone():
    sys.exit(1)


@pytest.mark.parametrize("how", [no_network, gone])
@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_weights_and_biases_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch, capsys, broken, how):
    module = Wandb(broken, how)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with MetricsLog(tmp_path, 0, {}) as log:
        for step in range(3):
            log.write(step, {"loss": 1.0})
    assert steps_of(tmp_path) == [0, 1, 2]
    assert module.calls[-1] == broken
    what = "ConnectionError: no network" if how is no_network else "SystemExit: 1"
    said = [line for line in capsys.readouterr().err.splitlines() if "Biases" in line]
    assert said == [f"warning: Weights & Biases gets no more of this run ({what}); metrics.jsonl goes on"]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_weights_and_biases_that_hangs_holds_up_no_step_and_the_end_for_a_bounded_time(
    tmp_path, monkeypatch, capsys, broken
):
    come = threading.Event()

    def hangs():
        come.wait()
        no_network()

    monkeypatch.setitem(sys.modules, "wandb", Wandb(broken, hangs))
    monkeypatch.setattr("sysdpo_jax.training.side_outputs.FINISH", 0.3)
    began = time.monotonic()
    with MetricsLog(tmp_path, 0, {}) as log:
        for step in range(100):
            log.write(step, {"loss": 1.0})
        assert time.monotonic() - began < 3
    assert time.monotonic() - began < 5
    assert steps_of(tmp_path) == list(range(100))
    assert "did not take all rows within" in capsys.readouterr().err
    # What comes of it later is told no more.
    come.set()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_run_without_the_network_trains_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("init", no_network))
    assert int(fit(tmp_path, 2, wandb={"project": "p"}).step) == 2
    assert "Weights & Biases gets no more of this run" in capsys.readouterr().err


def test_wandb_that_is_absent_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed"):
        fit(tmp_path / "run", 2, wandb={})
    assert not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("no room")

    monkeypatch.setattr("jax.profiler.start_trace", lambda directory: None)
    monkeypatch.setattr("jax.profiler.stop_trace", fails)
    assert int(fit(tmp_path, 3, profile=(1, 2)).step) == 3
    assert (
        f"warning: the trace of the steps is not written to {tmp_path / 'profile'}: no room" in capsys.readouterr().err
    )


def test_a_log_file_on_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    """Progress and warnings go to standard error."""
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: full(), flush=full, isatty=lambda: False))
    assert int(fit(tmp_path, 2).step) == 2
    assert steps_of(tmp_path) == [0, 1]
