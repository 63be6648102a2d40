"""The loop: resuming bit for bit, refusing another run's checkpoint, and stopping at a value that is not finite."""

import json

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, epoch_batches
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
from sysdpo_jax.training.identity import describe, fingerprints
from tests.training.systems import CHAIN, pairs

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
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == list(range(11))
    assert list((tmp_path / "whole").glob("events.out.tfevents*"))


def test_rows_after_the_checkpoint_and_a_torn_row_are_not_doubled(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 4, KEY)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    trainer(tmp_path, log_every=2).fit(fresh(), BATCH_AT, 8, KEY)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 6]


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
        return str(caught.value).splitlines()[1:]

    assert message(fresh(), config={"data": "B"}) == ['  configuration config data: saved "A", now "B"']
    objective = DirectObjective(beta=0.2)
    assert [line.split(":")[0] for line in message(fresh(), objective=objective)] == ["  configuration objective"]
    assert [line.split(":")[0] for line in message(fresh(1))] == [
        "  frozen c/kernel",
        *(f"  reference {name}/kernel" for name in ("a", "b")),
    ]
    other = make_optimizer(dict(OPTIMIZER.components) | {"b": FROZEN}, ema_decay=0.9)
    lines = message(fresh(optimizer=other), optimizer=other)
    assert "  array opt_state/b/0/trace/kernel: saved float32[3,2], now nothing" in lines
    assert any(line.startswith("  configuration optimizer b: ") for line in lines)


def test_starting_over_needs_another_directory(tmp_path):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    with pytest.raises(FileExistsError, match="resume, or choose another directory"):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY, resume=False)
    with pytest.raises(ValueError, match="holds step 3, which is not between"):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 2, KEY)


@pytest.mark.parametrize("part", ["state", "identity"])
def test_a_damaged_checkpoint_is_an_error_not_a_restart(tmp_path, part):
    trainer(tmp_path).fit(fresh(), BATCH_AT, 3, KEY)
    (tmp_path / "checkpoints" / "3" / part).rename(tmp_path / "elsewhere")
    with pytest.raises((KeyError, OSError, ValueError), match=part):
        trainer(tmp_path).fit(fresh(), BATCH_AT, 5, KEY)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_metrics_are_strict_json(tmp_path):
    def objective(*args):
        loss, metrics = DirectObjective()(*args)
        return loss, metrics | {"ratio": loss * np.nan}

    trainer(tmp_path, objective=objective).fit(fresh(), BATCH_AT, 1, KEY)
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["ratio"] is None
    np.testing.assert_allclose(row["loss"], np.log(2), rtol=1e-6)
    assert not any(name.startswith("finite") for name in row)


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
    assert describe(OPTIMIZER) == describe(make_optimizer(dict(OPTIMIZER.components), 0.9))
    assert " at 0x" not in describe(OPTIMIZER) + describe(CHAIN)
    assert "scale=1.0" in describe(CHAIN)
