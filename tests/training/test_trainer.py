"""The loop: resuming bit for bit, refusing another run's checkpoint, and stopping at a value that is not finite."""

import json
import re

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.manifest import describe, fingerprints
from sysdpo_jax.training import (
    FROZEN,
    CheckpointMismatchError,
    ComponentOptimizer,
    NonFiniteError,
    Trainer,
    create_state,
    make_optimizer,
    read_metrics,
)
from sysdpo_jax.training.checkpoints import CorruptCheckpointError
from tests.training.systems import CHAIN, pairs, trained_rows

KEY = jax.random.key(3)


OPTIMIZER = make_optimizer(
    {
        "a": ComponentOptimizer(optax.adam(1e-2)),
        "b": ComponentOptimizer(optax.sgd(1e-2, 0.9), trainable="kernel"),
        "c": FROZEN,
    },
    ema_decay=0.9,
)
BATCH_AT = epoch_batches(pairs(40), 8, seed=1)


def fresh(seed=0, optimizer=OPTIMIZER):
    return create_state(CHAIN, CHAIN.init(jax.random.key(seed)), optimizer)


def trainer(directory, **changes):
    settings = {"objective": DirectObjective(), "optimizer": OPTIMIZER, "checkpoint_every": 4} | changes
    return Trainer(CHAIN, directory=directory, **settings)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_two_parts_equal_one_run_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole").fit(fresh(), BATCH_AT, 11, KEY)
    trainer(tmp_path / "parts").fit(fresh(), BATCH_AT, 5, KEY)
    same(whole, trainer(tmp_path / "parts").fit(fresh(), BATCH_AT, 11, KEY))
    assert trained_rows(tmp_path / "whole") == trained_rows(tmp_path / "parts")
    assert [row["step"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == list(range(11))
    assert list((tmp_path / "whole").glob("events.out.tfevents*"))


def test_rows_after_the_checkpoint_and_a_torn_row_are_not_doubled(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 4, KEY)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    trainer(tmp_path, log_every=2).fit(fresh(), BATCH_AT, 8, KEY)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 6, 7]


def test_keeps_the_newest_checkpoints(tmp_path):
    trainer(tmp_path, checkpoint_every=2, keep=2).fit(fresh(), BATCH_AT, 7, KEY)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


@pytest.mark.parametrize("where", [0, 3, 6])
def test_a_bad_value_stops_with_step_and_node_and_the_state_before_it(tmp_path, where):
    def batch_at(step):
        batch = BATCH_AT(step)
        if step == where:
            batch.rejected["b"]["value"][2] = np.nan
        return batch

    with pytest.raises(NonFiniteError, match=f"step {where} met a value that is not finite in node 'b'") as caught:
        trainer(tmp_path).fit(fresh(), batch_at, 7, KEY)
    assert (caught.value.step, caught.value.nodes) == (where, ("b",))
    assert isinstance(caught.value, FloatingPointError)
    saved = trainer(tmp_path).fit(fresh(), BATCH_AT, where, KEY)
    assert int(saved.step) == where
    same(saved, trainer(tmp_path / "good").fit(fresh(), BATCH_AT, where, KEY))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == where
    finished = trainer(tmp_path).fit(fresh(), BATCH_AT, 7, KEY)
    same(finished, trainer(tmp_path / "good").fit(fresh(), BATCH_AT, 7, KEY))


def test_another_run_is_refused_by_path(tmp_path):
    trainer(tmp_path, config={"data": "A"}).fit(fresh(), BATCH_AT, 2, KEY)

    def message(state, **changes):
        with pytest.raises(CheckpointMismatchError) as caught:
            trainer(tmp_path, **{"config": {"data": "A"}, **changes}).fit(state, BATCH_AT, 4, KEY)
        said = re.search(r"is of another run \((.*)\): choose another directory", str(caught.value))
        return said[1].split("; ")

    assert message(fresh(), config={"data": "B"}) == ['configuration.config data was "A", now "B"']
    objective = DirectObjective(beta=0.2)
    assert message(fresh(), objective=objective) == ["configuration.objective.beta was 0.1, now 0.2"]
    assert [line.split(" was ")[0] for line in message(fresh(1))] == [
        "frozen.c/kernel",
        *(f"reference.{name}/kernel" for name in ("a", "b")),
    ]
    other = make_optimizer(dict(OPTIMIZER.components) | {"b": FROZEN}, ema_decay=0.9)
    lines = message(fresh(optimizer=other), optimizer=other)
    assert "array.opt_state/inner_states/b/inner_state/1/0/trace/b/kernel was float32[3,2], now nothing" in lines
    assert "configuration.optimizer b.mode was 'full', now 'frozen'" in lines


def test_starting_over_needs_another_directory(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    with pytest.raises(FileExistsError, match="resume, or choose another directory"):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY, resume=False)
    with pytest.raises(ValueError, match="holds step 3, which is not between"):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 2, KEY)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(tmp_path):
    whole = trainer(tmp_path / "whole").fit(fresh(), BATCH_AT, 7, KEY)
    trainer(tmp_path / "hurt", checkpoint_every=2).fit(fresh(), BATCH_AT, 5, KEY)
    (tmp_path / "hurt" / "checkpoints" / "5" / "state").rename(tmp_path / "elsewhere")
    asked = []

    def batch_at(step):
        asked.append(step)
        return BATCH_AT(step)

    with pytest.warns(UserWarning, match=r"checkpoints/5 cannot be used and is now .*its folder state is missing"):
        same(whole, trainer(tmp_path / "hurt", checkpoint_every=2).fit(fresh(), batch_at, 7, KEY))
    assert asked == [4, 5, 6]
    assert trained_rows(tmp_path / "whole") == trained_rows(tmp_path / "hurt")


def test_damaged_checkpoints_alone_are_an_error_not_a_restart(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    (tmp_path / "checkpoints" / "3" / "about").rename(tmp_path / "elsewhere")
    with (
        pytest.warns(UserWarning, match="about/metadata is missing"),
        pytest.raises(CorruptCheckpointError, match="no checkpoint that can be used"),
    ):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 5, KEY)
    for resume, kind in ((True, CorruptCheckpointError), (False, FileExistsError)):
        with pytest.raises(kind):
            trainer(tmp_path).fit(fresh(), BATCH_AT, 5, KEY, resume=resume)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_the_best_checkpoint_is_that_of_the_best_mean(tmp_path):
    """Recomputed from the rows, one a step."""
    runner = trainer(tmp_path, checkpoint_every=3, keep=1, best=("loss", "max"))
    runner.fit(fresh(), BATCH_AT, 12, KEY)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    means = {end: np.mean([row["loss"] for row in rows[end - 3 : end]]) for end in (3, 6, 9, 12)}
    best = max(means, key=means.__getitem__)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({best, 12})
    state = fresh()
    with runner.checkpoints(state, BATCH_AT, KEY) as checkpoints:
        assert checkpoints.best == best
        assert int(checkpoints.restore(state, best).step) == best
    with pytest.raises(ValueError, match=r"has no metric 'reward', choose one of .*loss"):
        trainer(tmp_path / "other", best=("reward", "max")).fit(fresh(), BATCH_AT, 1, KEY)


def test_the_host_reads_at_rows_alone_and_after_the_next_step(tmp_path, monkeypatch):
    """Whatever reads a metric on the device is counted, with a row every 4 steps of 10 and of the last one."""
    runner, events, numbers = trainer(tmp_path, log_every=4, checkpoint_every=100), [], {}
    step, kind = runner.step, type(jax.numpy.zeros(()))

    def counting(read):
        def counted(array, *args, **kwargs):
            if id(array) in numbers and events[-1] != ("read", numbers[id(array)]):
                events.append(("read", numbers[id(array)]))
            return read(array, *args, **kwargs)

        return counted

    for name in ("__array__", "__bool__", "__float__", "__int__", "item", "tolist"):
        monkeypatch.setattr(kind, name, counting(getattr(kind, name)))
    held = []

    def counted_step(*args):
        state, metrics = step(*args)
        held.append(metrics)
        numbers.update({id(array): len(held) - 1 for array in metrics.values()})
        events.append(("step", len(held) - 1))
        return state, metrics

    counted_step.mesh, counted_step.metric_names = step.mesh, step.metric_names
    runner.__dict__["step"] = counted_step
    runner.fit(fresh(), BATCH_AT, 10, KEY)
    steps = [("step", number) for number in range(10)]
    assert events == [*steps[:2], ("read", 0), *steps[2:6], ("read", 4), *steps[6:], ("read", 8), ("read", 9)]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 4, 8, 9]


def test_a_bad_value_between_two_rows_is_found_at_the_next_one(tmp_path):
    """Steps go on until it is read, and change nothing: number, nodes and state are those of the first bad one."""

    def batch_at(step):
        batch = BATCH_AT(step)
        if step in (3, 5):
            batch.rejected["b" if step == 3 else "a"]["value"][2] = np.nan
        return batch

    with pytest.raises(NonFiniteError, match="step 3 met a value that is not finite in node 'b'"):
        trainer(tmp_path, log_every=8).fit(fresh(), batch_at, 20, KEY)
    saved = trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    same(saved, trainer(tmp_path / "good").fit(fresh(), BATCH_AT, 3, KEY))


def test_the_steps_asked_for_are_traced(tmp_path):
    with pytest.raises(ValueError, match=r"profile \(3, 3\) must be"):
        trainer(tmp_path, profile=(3, 3))
    trainer(tmp_path, profile=(2, 9)).fit(fresh(), BATCH_AT, 4, KEY)
    assert [path.stat().st_size > 0 for path in (tmp_path / "profile").rglob("*.xplane.pb")] == [True]


def test_speed_is_in_the_rows(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert ["throughput/steps_per_second" in row for row in rows] == [False, True, True]
    np.testing.assert_allclose(
        [row["throughput/pairs_per_second"] for row in rows[1:]],
        [8 * row["throughput/steps_per_second"] for row in rows[1:]],
        rtol=1e-12,
    )


def test_metrics_are_strict_json(tmp_path):
    def objective(*args):
        loss, aux = DirectObjective()(*args)
        return loss, aux._replace(metrics={**aux.metrics, "ratio": loss * np.nan, "finiteness": loss})

    trainer(tmp_path, objective=objective).fit(fresh(), BATCH_AT, 1, KEY)
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["ratio"] is None
    np.testing.assert_allclose(row["loss"], np.log(2), rtol=1e-6)
    assert [name for name in row if name.startswith("finite")] == ["finiteness"]


def test_plain_lines_off_a_terminal(tmp_path, capsys):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    assert "step 3/3  loss 0." in capsys.readouterr().err


def test_fingerprints_see_every_bit_and_place():
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4)
    tiny, moved, low = leaf.copy(), leaf.copy(), leaf.astype(np.float16)
    tiny[2, 3] = np.nextafter(leaf[2, 3], 99)
    moved[0], moved[1] = leaf[1], leaf[0]
    trees = [leaf, tiny, moved, leaf.T.copy(), leaf.reshape(4, 3), low, -leaf, leaf.astype(bool), leaf.astype(np.int32)]
    texts = [fingerprints({"x": jax.numpy.asarray(tree)})["x"].split()[1] for tree in trees]
    assert len(set(texts)) == len(trees) - 1  # [3, 4] and its [4, 3] reshape hold the same words in the same order
    assert texts[0] == texts[4]


def test_descriptions_hold_no_addresses():
    texts = describe("it", OPTIMIZER)
    assert texts == describe("it", make_optimizer(dict(OPTIMIZER.components), 0.9))
    assert " at 0x" not in repr(texts) + repr(describe("it", CHAIN))
