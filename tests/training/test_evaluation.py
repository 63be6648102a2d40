"""Evaluations between steps: when they run, what they stop, which checkpoint they keep, what a resumed run repeats."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    ComponentOptimizer,
    DirectObjective,
    Evaluation,
    Trainer,
    create_state,
    epoch_batches,
    make_optimizer,
)
from sysdpo_jax.training import read_metrics
from tests.training.systems import CHAIN, pairs, trained_rows

OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(0.01)) for name in "abc"})
BATCHES = epoch_batches(pairs(8), 4, seed=0)
KEY = jax.random.key(1)


def fresh():
    return create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)


def trainer(directory, measure, every=2, **settings):
    evaluation = Evaluation(
        measure, every, **{name: settings.pop(name) for name in ("best", "patience") if name in settings}
    )
    return Trainer(
        CHAIN, DirectObjective(), OPTIMIZER, directory, evaluation=evaluation, checkpoint_every=3, **settings
    )


def evaluated(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}


def scripted(*scores):
    """The k-th evaluation, at the step 2 k, measures scores[k]."""
    return lambda step, params: {"score": scores[step // 2]}


def test_the_policy_is_measured_before_the_first_step_and_after_the_last(tmp_path):
    """What is measured at step s is the state after s updates, as a run of s steps leaves it."""

    def norm(step, params):
        return {"score": float(np.sum([np.square(leaf).sum() for leaf in jax.tree.leaves(params)]))}

    trainer(tmp_path / "run", norm).fit(fresh(), BATCHES, 5, KEY)
    found = evaluated(tmp_path / "run")
    assert list(found) == [0, 2, 4, 5]
    for step, value in found.items():
        alone = Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path / str(step)).fit(fresh(), BATCHES, step, KEY)
        assert value == norm(step, alone.params)["score"]
    # Rows of training are all there, too.
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == list(range(5))


def test_training_stops_without_improvement_and_keeps_the_best(tmp_path):
    own = trainer(tmp_path, scripted(0.5, 0.7, 0.6, 0.65, 0.9), best=("score", "max"), patience=2)
    state = own.fit(fresh(), BATCHES, 100, KEY)
    assert int(state.step) == 6
    assert evaluated(tmp_path) == {0: 0.5, 2: 0.7, 4: 0.6, 6: 0.65}
    with own.checkpoints(fresh(), BATCHES, KEY) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (2, 6)
        assert int(checkpoints.restore(fresh(), checkpoints.best).step) == 2


def test_the_smallest_may_be_the_best(tmp_path):
    own = trainer(tmp_path, scripted(3, 1, 2, 2), best=("score", "min"), patience=3)
    own.fit(fresh(), BATCHES, 6, KEY)
    with own.checkpoints(fresh(), BATCHES, KEY) as checkpoints:
        assert checkpoints.best == 2


def test_a_resumed_run_evaluates_what_an_uninterrupted_one_does(tmp_path):
    scores = scripted(0.5, 0.7, 0.6, 0.65, 0.9, 0.9)
    settings = {"best": ("score", "max"), "patience": 3}
    whole = trainer(tmp_path / "whole", scores, **settings).fit(fresh(), BATCHES, 9, KEY)

    def interrupted(step, params):
        if step == 6:
            raise OSError("the judge is gone")
        return scores(step, params)

    with pytest.raises(OSError, match="the judge is gone"):
        trainer(tmp_path / "cut", interrupted, **settings).fit(fresh(), BATCHES, 9, KEY)
    # Nothing is lost: the state before the evaluation is saved.
    with trainer(tmp_path / "cut", scores, **settings).checkpoints(fresh(), BATCHES, KEY) as checkpoints:
        assert checkpoints.latest == 6
    resumed = trainer(tmp_path / "cut", scores, **settings).fit(fresh(), BATCHES, 9, KEY)
    assert int(whole.step) == int(resumed.step) == 9
    assert trained_rows(tmp_path / "cut") == trained_rows(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.params), jax.device_get(resumed.params))


def test_patience_counts_evaluations_before_the_interruption(tmp_path):
    settings = {"best": ("score", "max"), "patience": 3}
    scores = scripted(0.5, 0.7, 0.6, 0.6, 0.6, 0.9)
    trainer(tmp_path, scores, **settings).fit(fresh(), BATCHES, 5, KEY)
    state = trainer(tmp_path, scores, **settings).fit(fresh(), BATCHES, 100, KEY)
    # 0.7 at step 2, and 0.6 at the steps 4, 6 and 8.
    assert int(state.step) == 8


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"score": float("nan")}, "the evaluation at step 0 has score = nan"),
        ({"other": 1.0}, "the evaluation at step 0 has no 'score', only other"),
    ],
)
def test_figures_that_cannot_be_used(tmp_path, figures, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, lambda step, params: figures, best=("score", "max")).fit(fresh(), BATCHES, 2, KEY)


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="patience needs `best`"):
        Evaluation(scripted(), 2, patience=1)
    with pytest.raises(ValueError, match="must be at least 1"):
        Evaluation(scripted(), 0)
    evaluation = Evaluation(scripted(), 2, best=("score", "max"))
    with pytest.raises(ValueError, match="not by both"):
        Trainer(CHAIN, DirectObjective(), OPTIMIZER, tmp_path, best=("loss", "min"), evaluation=evaluation)


def test_weights_and_biases_gets_the_rows(tmp_path, monkeypatch):
    """A stand-in for the package: what is asked of it, and the same run at a second start."""
    started, logged = [], []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, sorted(values))), finish=lambda: logged.append("end")
    )

    def init(**settings):
        started.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = {"wandb": "my-project"}
    trainer(tmp_path / "run", scripted(1, 2), **settings).fit(fresh(), BATCHES, 1, KEY)
    trainer(tmp_path / "run", scripted(1, 2), **settings).fit(fresh(), BATCHES, 2, KEY)
    assert started[0] == started[1]
    assert (started[0]["project"], started[0]["name"], started[0]["resume"]) == ("my-project", "run", "allow")
    assert (0, ["eval/score"]) in logged
    assert any(step == 0 and "loss" in names for step, names in (entry for entry in logged if entry != "end"))
    assert logged[-1] == "end"


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="'my-project' of Weights & Biases, which is not"):
        trainer(tmp_path, scripted(1, 2), wandb="my-project").fit(fresh(), BATCHES, 1, KEY)
