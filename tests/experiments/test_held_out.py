"""Evaluations of a run: what is compared, what is left out, and which one is the best."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import sysdpo_jax as sj
from experiments.own.config import ConfigError
from experiments.own.evaluation import HeldOut
from experiments.own.report import best_evaluation
from experiments.own.unscored import ScoreError

SYSTEM = sj.CompoundSystem(("x",), (sj.Node("z", sj.Categorical(50, (4,)), ("x",)),))
PROMPTS = [{"x": x} for x in range(4)]


def value(run):
    return float(run["z"])


def even(run):
    """No score for odd values."""
    return float(run["z"]) if run["z"] % 2 == 0 else float("nan")


def held_out(folder, scorer=value, skip=False, about="a"):
    return HeldOut(SYSTEM, PROMPTS, scorer, 1, skip, 8, 16, 0, folder / "evaluation", {"scorer": about})


def params(seed):
    return SYSTEM.init(jax.random.key(seed))


def values(folder, step):
    lines = (folder / "evaluation" / f"runs-{step:08d}.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["outputs"]["z"] for line in lines])


def test_figures_are_those_of_the_runs_on_disk(tmp_path):
    measured = held_out(tmp_path)
    measured.measure(0, params(0))
    found = measured.measure(5, params(1))
    before, after = values(tmp_path, 0), values(tmp_path, 5)
    assert found["score"] == pytest.approx(after.mean())
    assert found["win_rate"] == pytest.approx(((after > before) + 0.5 * (after == before)).mean())
    assert (found["runs"], found["unscored"]) == (32, 0)


def test_runs_without_a_score_leave_their_pair_out(tmp_path):
    measured = held_out(tmp_path, even, skip=True)
    measured.measure(0, params(0))
    found = measured.measure(5, params(1))
    before, after = values(tmp_path, 0), values(tmp_path, 5)
    both = (before % 2 == 0) & (after % 2 == 0)
    assert 0 < both.sum() < 32
    assert found["score"] == pytest.approx(after[both].mean())
    assert (found["runs"], found["unscored"]) == (both.sum(), 32 - both.sum())
    with pytest.raises(ScoreError, match="is nan: mend the scorer"):
        held_out(tmp_path / "stop", even).measure(0, params(0))
    with pytest.raises(ScoreError, match="only 0 of 32 runs have a score"):
        held_out(tmp_path / "none", lambda run: None, skip=True).measure(0, params(0))


def test_scores_of_two_scorers_are_not_compared(tmp_path):
    measured = held_out(tmp_path)
    measured.check()
    measured.measure(0, params(0))
    measured.check()
    with pytest.raises(ConfigError, match=r"made with another evaluation\.scorer .* choose another directory"):
        replace(measured, about={"scorer": "b"}).check()


def test_a_run_that_has_trained_without_evaluation_has_nothing_to_compare_with(tmp_path):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    held_out(tmp_path).check()
    (tmp_path / "checkpoints" / "3").mkdir()
    with pytest.raises(ConfigError, match="has trained without an evaluation"):
        held_out(tmp_path).check()


@pytest.mark.parametrize(
    ("rates", "best"), [((0.5, 0.7, 0.6), 1), ((0.5, 0.6, 0.6), 2), ((0.5, 0.4, 0.3), 0), ((0.5,), 0), ((), None)]
)
def test_the_best_evaluation_is_that_of_the_checkpoints(rates, best):
    """Of equal ones the last; step 0 where nothing was better than the system before training."""
    rows = [{"step": step, "eval/win_rate": rate} for step, rate in enumerate(rates)]
    assert best_evaluation([{"step": 0, "loss": 0.7}, *rows]) == best
