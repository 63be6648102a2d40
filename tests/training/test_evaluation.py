"""Evaluation in the loop: which states are measured, what stops a run, the best checkpoint, and resuming all of it."""

import os
import signal

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, Preempted, epoch_batches
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    Evaluation,
    EvaluationError,
    NonFiniteError,
    Trainer,
    create_state,
    make_optimizer,
    read_metrics,
)
from tests.training.systems import CHAIN, pairs, trained_rows

KEY = jax.random.key(3)
OPTIMIZER = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN, "c": FROZEN})
BATCH_AT = epoch_batches(pairs(40), 8, seed=1)


def fresh():
    return create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)


class Measured:
    """Gives the figures of a list, one an evaluation step, and keeps the steps and a leaf of the parameters."""

    def __init__(self, values, every=2, fails_at=None):
        self.values, self.every, self.fails_at, self.seen = values, every, fails_at, {}

    def __call__(self, step, params):
        assert step not in self.seen
        if step == self.fails_at:
            raise OSError("the judge is away")
        self.seen[step] = np.array(params["a"]["kernel"])
        return {"score": self.values[step // self.every], "length": float(step)}


def trainer(directory, measure, every=2, stop_on=None, **changes):
    settings = {"checkpoint_every": 4, "evaluation": Evaluation(measure, every, stop_on)} | changes
    return Trainer(CHAIN, DirectObjective(), OPTIMIZER, directory, **settings)


def evaluated(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}


def steps_of(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_every_so_many_updates_and_at_both_ends(tmp_path):
    measure = Measured([0.1, 0.3, 0.2, 0.5])
    trainer(tmp_path / "seen", measure).fit(fresh(), BATCH_AT, 5, KEY)
    assert evaluated(tmp_path / "seen") == {0: 0.1, 2: 0.3, 4: 0.2, 5: 0.2}
    rows = read_metrics(tmp_path / "seen" / "metrics.jsonl")
    assert [(row["step"], "loss" in row) for row in rows] == [
        (0, False), (0, True), (1, True), (2, False), (2, True), (3, True), (4, False), (4, True), (5, False)
    ]  # fmt: skip
    for step, kernel in measure.seen.items():
        state = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path / str(step)).fit(fresh(), BATCH_AT, step, KEY)
        np.testing.assert_array_equal(kernel, state.params["a"]["kernel"])


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 6)])
def test_the_best_evaluation_is_kept(tmp_path, mode, best):
    runner = trainer(tmp_path, Measured([0.4, 0.6, 0.5, 0.1, 0.3]), best=("eval/score", mode), keep=1)
    runner.fit(fresh(), BATCH_AT, 9, KEY)
    assert steps_of(tmp_path) == [best, 9]
    state = fresh()
    with runner.checkpoints(state, BATCH_AT, KEY) as checkpoints:
        assert checkpoints.best == best
        kernel = np.asarray(checkpoints.restore(state, best).params["a"]["kernel"])
    np.testing.assert_array_equal(kernel, runner.evaluation.measure.seen[best])


def test_training_ends_when_patience_does(tmp_path, capsys):
    """At 4 a tie, at 6 worse: two evaluations that were no better than the one at step 2."""
    values = [0.1, 0.3, 0.3, 0.2, 0.9, 0.9]
    runner = trainer(tmp_path, Measured(values), stop_on=("eval/score", "max", 2))
    assert int(runner.fit(fresh(), BATCH_AT, 10, KEY).step) == 6
    said = "training ends at step 6: eval/score was 0.3 at step 2 and no better in 2 evaluations since"
    assert said in capsys.readouterr().err
    assert steps_of(tmp_path)[-1] == 6
    again = trainer(tmp_path, Measured(values), stop_on=("eval/score", "max", 2))
    assert int(again.fit(fresh(), BATCH_AT, 10, KEY).step) == 6
    assert again.evaluation.measure.seen == {}
    more = trainer(tmp_path, Measured(values), stop_on=("eval/score", "max", 3))
    assert int(more.fit(fresh(), BATCH_AT, 10, KEY).step) == 10


@pytest.mark.parametrize("where", [3, 4, 5])
def test_a_run_in_parts_measures_and_stops_as_a_whole_one(tmp_path, where):
    """Asked to stop in an evaluation's step or beside it: no row is missing or twice, and the patience goes on."""
    values, rule = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1], ("eval/score", "max", 3)

    def signalled(step):
        if step == where - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return BATCH_AT(step)

    settings = {"stop_on": rule, "best": ("eval/score", "max"), "keep": 1}
    trainer(tmp_path / "whole", Measured(values), **settings).fit(fresh(), BATCH_AT, 10, KEY)
    with pytest.raises(Preempted):
        trainer(tmp_path / "parts", Measured(values), **settings).fit(fresh(), signalled, 10, KEY)
    assert max(evaluated(tmp_path / "parts")) == (2 if where < 5 else 4)
    state = trainer(tmp_path / "parts", Measured(values), **settings).fit(fresh(), BATCH_AT, 10, KEY)
    assert int(state.step) == 8
    assert trained_rows(tmp_path / "parts") == trained_rows(tmp_path / "whole")
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole") == [2, 8]


def test_the_state_is_safe_while_it_is_measured(tmp_path):
    """A measure that fails costs nothing but the measurement, which comes again."""
    with pytest.raises(EvaluationError, match=r"at step 2, .*:Measured, failed .OSError: the judge is away.: fix it"):
        trainer(tmp_path, Measured([0.1, 0.2, 0.3], fails_at=2)).fit(fresh(), BATCH_AT, 4, KEY)
    assert steps_of(tmp_path) == [0, 2]
    runner = trainer(tmp_path, Measured([0.1, 0.2, 0.3]), best=("eval/score", "max"))
    runner.fit(fresh(), BATCH_AT, 4, KEY)
    assert list(runner.evaluation.measure.seen) == [2, 4]
    assert evaluated(tmp_path) == {0: 0.1, 2: 0.2, 4: 0.3}


def test_a_state_saved_earlier_can_still_be_the_best(tmp_path):
    Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path).fit(fresh(), BATCH_AT, 2, KEY)
    runner = trainer(tmp_path, Measured([0.1, 0.9, 0.3, 0.2]), best=("eval/score", "max"), keep=1)
    runner.fit(fresh(), BATCH_AT, 6, KEY)
    assert steps_of(tmp_path) == [2, 6]


def test_a_bad_step_is_found_before_the_state_is_measured(tmp_path):
    def batch_at(step):
        batch = BATCH_AT(step)
        if step == 3:
            batch.rejected["a"]["value"][2] = np.nan
        return batch

    measure = Measured([0.1, 0.2, 0.3])
    with pytest.raises(NonFiniteError, match="step 3"):
        trainer(tmp_path, measure, log_every=10).fit(fresh(), batch_at, 6, KEY)
    assert list(measure.seen) == [0, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_figure_that_is_not_finite_is_named(tmp_path, value):
    with pytest.raises(EvaluationError, match=f"the evaluation at step 2 gave {value} for 'eval/score': fix"):
        trainer(tmp_path, Measured([0.1, value])).fit(fresh(), BATCH_AT, 4, KEY)
    assert evaluated(tmp_path) == {0: 0.1}
    assert steps_of(tmp_path) == [0, 2]


def test_a_figure_that_nobody_measures_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="best: the evaluation gave no 'eval/win', choose one of eval/length, "):
        trainer(tmp_path, Measured([0.1]), best=("eval/win", "max")).fit(fresh(), BATCH_AT, 1, KEY)
    with pytest.raises(EvaluationError, match="stop_on: the evaluation gave no 'eval/win'"):
        trainer(tmp_path, Measured([0.1]), stop_on=("eval/win", "max", 1)).fit(fresh(), BATCH_AT, 1, KEY)
    with pytest.raises(ValueError, match="give the Trainer one"):
        Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path, best=("eval/win", "max")).fit(fresh(), BATCH_AT, 1, KEY)
    with pytest.raises(ValueError, match=r"stop_on .* must be a metric 'eval/<name>'"):
        Evaluation(Measured([]), 1, ("win", "max", 1))
