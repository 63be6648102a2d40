"""SIGTERM and Ctrl-C: the step ends, everything is saved, and the run goes on from there bit for bit."""

import os
import signal
import threading

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.training import FROZEN, ComponentOptimizer, Trainer, create_state, make_optimizer, read_metrics
from sysdpo_jax.training.preemption import Preempted, stop_requests
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(3)
OPTIMIZER = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN, "c": FROZEN})
BATCH_AT = epoch_batches(pairs(40), 8, seed=1)


def fresh():
    return create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)


def signalled(number, where):
    """Batches of which one sends this process a signal."""

    def batch_at(step):
        if step == where:
            os.kill(os.getpid(), number)
        return BATCH_AT(step)

    return batch_at


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, capsys, number, kind):
    trainer = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path / "asked", log_every=3)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(kind) as caught:
        trainer.fit(fresh(), signalled(number, 4), 9, KEY)
    line = (
        f"asked to stop: step 5 is saved in {tmp_path / 'asked' / 'checkpoints'}, the same command goes on from there"
    )
    assert str(caught.value) == line
    if kind is Preempted:
        assert caught.value.code == 0
        assert line in capsys.readouterr().err.splitlines()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [path.name for path in (tmp_path / "asked" / "checkpoints").iterdir()] == ["5"]
    assert [row["step"] for row in read_metrics(tmp_path / "asked" / "metrics.jsonl")] == [0, 3]
    trainer.fit(fresh(), BATCH_AT, 6, KEY)
    whole = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path / "whole").fit(fresh(), BATCH_AT, 9, KEY)
    resumed = trainer.fit(fresh(), BATCH_AT, 9, KEY)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(resumed))


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    trainer = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path)
    with pytest.raises(Preempted, match="step 2 is saved"):
        trainer.fit(fresh(), signalled(signal.SIGTERM, 1), 2, KEY)
    assert int(trainer.fit(fresh(), BATCH_AT, 2, KEY).step) == 2


@pytest.fixture
def interruptible():
    """A shell starts its background jobs, perhaps these tests, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_ctrl_c_interrupts_at_once(tmp_path):
    with stop_requests(tmp_path) as asked:
        assert asked(6) is None
        signal.raise_signal(signal.SIGINT)
        assert str(asked(7)).startswith("asked to stop: step 7 is saved")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_train_without_signals(tmp_path):
    """Python lets no other thread set a handler."""
    states = []
    trainer = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path)
    thread = threading.Thread(target=lambda: states.append(trainer.fit(fresh(), BATCH_AT, 2, KEY)))
    thread.start()
    thread.join()
    assert [int(state.step) for state in states] == [2]
