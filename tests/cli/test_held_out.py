"""Evaluations of a run: what is compared, what is left out, and which one is the best."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sysdpo_jax as sj
from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation import share_interval
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.report.outcome import best_evaluation, final_figures, summary
from sysdpo_jax.report.tables import spread
from sysdpo_jax.runs.held_out import HeldOut, RunScorer

SYSTEM = sj.CompoundSystem(("x",), (sj.Node("z", sj.Categorical(50, (4,)), ("x",)),))
PROMPTS = [{"x": x} for x in range(4)]


def value(run):
    return float(run["z"])


def even(run):
    """No score for odd values."""
    return float(run["z"]) if run["z"] % 2 == 0 else float("nan")


def low(run):
    """Right or wrong."""
    return run["z"] < 40


def held_out(folder, scorer=value, skip=False, about="a", prompts=PROMPTS):
    maker = RunScorer(SYSTEM, scorer, 1, skip, 16, {"scorer": about})
    return HeldOut(maker, prompts, 8, 0, folder / "evaluation", "a")


def changed(measured, **changes):
    """With another maker."""
    return replace(measured, maker=replace(measured.maker, **changes))


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
    assert (found["runs"], found["prompts"], found["unscored"]) == (32, 4, 0)
    change = after - before
    assert found["score_difference"] == pytest.approx(change.mean())
    # Of four prompts with eight runs each: the error is that of four means, Student's t with 3 degrees of freedom.
    reach = 3.182446305 * np.std(change.reshape(4, 8).mean(axis=1), ddof=1) / 2
    assert found["score_difference/high"] - change.mean() == pytest.approx(reach)
    assert 0 <= found["win_rate/low"] < found["win_rate"] < found["win_rate/high"] <= 1


def test_before_training_all_pairs_are_ties_and_what_may_be_is_not_sure(tmp_path):
    found = held_out(tmp_path).measure(0, params(0))
    assert (found["win_rate"], found["score_difference"]) == (0.5, 0)
    assert (found["win_rate/low"], found["win_rate/high"]) == share_interval(0.5, 0.0, 0.0, 32, 4)


def test_scores_of_right_and_wrong_are_a_share(tmp_path):
    """All runs right, whose interval has a width, and ends at 1."""
    measured = held_out(tmp_path, lambda run: True)
    measured.measure(0, params(0))
    found = measured.measure(5, params(1))
    assert (found["score"], found["score/high"]) == (1, 1)
    assert found["score/low"] == share_interval(1.0, 0.0, 0.0, 32, 4).low < 0.6
    mixed = held_out(tmp_path / "mixed", low)
    mixed.measure(0, params(0))
    found = mixed.measure(5, params(1))
    assert 0 < found["score/low"] < found["score"] < found["score/high"] < 1


def test_one_prompt_has_figures_and_no_interval(tmp_path):
    measured = held_out(tmp_path, prompts=PROMPTS[:1])
    measured.measure(0, params(0))
    found = measured.measure(5, params(1))
    assert set(found) == {"score", "win_rate", "score_difference", "runs", "prompts", "unscored"}
    before, after = values(tmp_path, 0), values(tmp_path, 5)
    assert found["win_rate"] == pytest.approx(((after > before) + 0.5 * (after == before)).mean())
    assert found["score_difference"] == pytest.approx((after - before).mean())
    with pytest.raises(ScoreError, match="only 0 of 8 runs have a score"):
        held_out(tmp_path / "none", lambda run: None, skip=True, prompts=PROMPTS[:1]).measure(0, params(0))


def test_runs_without_a_score_leave_their_pair_out(tmp_path):
    measured = held_out(tmp_path, even, skip=True)
    measured.measure(0, params(0))
    found = measured.measure(5, params(1))
    before, after = values(tmp_path, 0), values(tmp_path, 5)
    both = (before % 2 == 0) & (after % 2 == 0)
    assert 0 < both.sum() < 32
    assert found["score"] == pytest.approx(after[both].mean())
    assert (found["runs"], found["unscored"]) == (both.sum(), 32 - both.sum())
    with pytest.raises(ScoreError, match="is nan: fix the scorer"):
        held_out(tmp_path / "stop", even).measure(0, params(0))
    said = (
        r"only 0 of 32 runs have a score, .*; 32 were made and have no score: fix the scorer or the judge's template$"
    )
    with pytest.raises(ScoreError, match=said):
        held_out(tmp_path / "none", lambda run: None, skip=True).measure(0, params(0))


class Stopping:
    """A scorer that fails at its call number `end`."""

    def __init__(self, end=None, error=ConnectionError):
        self.scored, self.end, self.error = [], end, error

    def __call__(self, run):
        if len(self.scored) == self.end:
            raise self.error("no route")
        self.scored.append(run["z"])
        return float(run["z"])


@pytest.mark.parametrize(("error", "raised"), [(ConnectionError, ScoreError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_what_an_evaluation_has_when_it_is_stopped_is_taken_when_it_begins_again(tmp_path, error, raised):
    whole = held_out(tmp_path / "whole")
    expected = [whole.measure(step, params(step)) for step in (0, 5)][1]
    stopped, again = Stopping(5, error), Stopping()
    held_out(tmp_path).measure(0, params(0))
    with pytest.raises(raised):
        held_out(tmp_path, stopped).measure(5, params(5))
    found = held_out(tmp_path, again).measure(5, params(5))
    assert (len(stopped.scored), len(again.scored)) == (5, 27)
    assert found == expected
    names = [f"runs-{step:08d}.jsonl" for step in (0, 5)]
    for name in names:
        assert (tmp_path / "evaluation" / name).read_bytes() == (tmp_path / "whole" / "evaluation" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == sorted([*names, f"{names[0]}.json"])


@pytest.mark.parametrize("other", [{"seed": 1}, {"about": {"scorer": "b"}}, {"made_by": "b"}, {"params": 6}], ids=str)
def test_what_was_made_in_another_way_is_not_taken(tmp_path, other):
    held_out(tmp_path).measure(0, params(0))
    with pytest.raises(ScoreError):
        held_out(tmp_path, Stopping(5)).measure(5, params(5))
    again = Stopping()
    other_maker = changed(held_out(tmp_path, again), **{name: other[name] for name in other.keys() & {"about"}})
    changes = {name: other[name] for name in other.keys() & {"seed", "made_by"}}
    replace(other_maker, **changes).measure(5, params(other.get("params", 5)))
    assert len(again.scored) == 32
    assert again.scored == values(tmp_path, 5).tolist()


def test_a_run_that_a_tool_gave_for_an_evaluation_is_not_made_again(tmp_path):
    def measured(folder, calls, fails=()):
        def ask(x):
            calls.append(x)
            if x in fails:
                raise ConnectionError("no route")
            return x

        nodes = (sj.Node("found", sj.Tool(ask), ("x",)), sj.Node("z", sj.Categorical(50, (4,)), ("found",)))
        system = sj.CompoundSystem(("x",), nodes)
        one = changed(held_out(folder), system=system)
        return one.measure(0, system.init(jax.random.key(0)))

    first, second = [], []
    expected = measured(tmp_path / "whole", [])
    with pytest.raises(sj.RecordError, match="prompt 3, sample 1: node 'found'"):
        measured(tmp_path, first, fails=(2,))
    with (tmp_path / "evaluation" / "runs-00000000.jsonl.begun-00001-of-00001").open("a") as file:
        # As a kill leaves it.
        file.write('{"id": "2-0", "inp')
    assert measured(tmp_path, second) == expected
    assert first == [x for x in (0, 1) for _ in range(8)] + [2]
    assert second == [x for x in (2, 3) for _ in range(8)]


def test_a_fingerprint_tells_parameters_apart():
    def fingerprint(params):
        return digest(fingerprints(params))

    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": {"c": np.ones(2, np.int64), "d": np.array([True])}}
    swapped = {**tree, "a": tree["a"][[1, 0, 2]]}
    nudged = {**tree, "a": np.nextafter(tree["a"], np.float32(99))}
    flipped = {**tree, "b": {**tree["b"], "d": np.array([False])}}
    found = [fingerprint(one) for one in (tree, swapped, nudged, flipped)]
    assert len(set(found)) == 4
    assert fingerprint(jax.tree.map(np.copy, tree)) == found[0]
    half = jnp.ones((2, 3), jnp.bfloat16)
    assert fingerprint(half) != fingerprint(half.at[1, 2].set(1.0078125))


def test_scores_of_two_scorers_are_not_compared(tmp_path):
    measured = held_out(tmp_path)
    measured.check()
    measured.measure(0, params(0))
    measured.check()
    with pytest.raises(ConfigError, match=r"evaluation\.scorer was a, now b\): .* choose another directory"):
        changed(measured, about={"scorer": "b"}).check()


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


def row(step, rate=0.5, ends=(0.4, 0.6), **figures):
    known = {"win_rate/low": ends[0], "win_rate/high": ends[1]} if ends else {}
    change = {"score_difference/low": 0.1, "score_difference/high": 0.3} if ends else {}
    made = {"win_rate": rate, "score": 1.25, "score_difference": 0.2, "runs": 96, "prompts": 24, "unscored": 0}
    return {"step": step, **{f"eval/{name}": value for name, value in (made | known | change | figures).items()}}


def said(*rows):
    return list(summary([{"step": 0, "loss": 0.7}, *rows], 400))


def test_the_result_is_that_of_the_best_evaluation():
    rows = (row(0), row(200, 0.7, (0.6, 0.78)), row(400, 0.6))
    assert said(*rows) == [
        "win rate 70.0% [60.0, 78.0] over 24 prompts x 4 samples, best of 2 evaluations at step 200",
        "score 1.05 before, 1.25 after: difference +0.2 [+0.1, +0.3]",
    ]
    found = final_figures(rows)
    assert (found["step"], found["win_rate"], found["win_rate/low"], found["score_before"]) == (200, 0.7, 0.6, 1.05)


def test_what_chance_could_give_is_said_to_be_so():
    assert "55.0% [45.0, 65.0], which chance alone could give, over" in said(row(0), row(400, 0.55, (0.45, 0.65)))[0]


def test_a_system_that_got_worse_is_said_to_be_worse():
    [first, *_] = said(row(0), row(200, 0.3, (0.2, 0.41)), row(400, 0.4, (0.3, 0.49)))
    assert first.endswith("at step 400, the last: no evaluation was better than the system before training")
    assert first.startswith("win rate 40.0% [30.0, 49.0] over")


def test_nothing_is_said_of_evaluations_that_were_not_made():
    assert said() == []
    assert final_figures([{"step": 0, "loss": 0.7}]) == {}
    [first, last] = said(row(0, **{"score/low": 1.0, "score/high": 1.5}))
    assert first.startswith("score 1.25 [1, 1.5] before training over 24 prompts x 4 samples; no evaluation since")
    assert last == "the last evaluation was at step 0 of 400"
    assert final_figures([row(0)]) == {}
    assert said(row(0), row(200))[-1] == "the last evaluation was at step 200 of 400"


def test_few_prompts_and_runs_without_a_score_are_told():
    lines = said(row(0, prompts=6), row(400, 0.7, (0.6, 0.78), prompts=6, runs=20, unscored=4))
    assert "over 6 prompts, 20 runs (4 left out, which have no score), at step 400" in lines[0]
    assert lines[-1] == "too few prompts (n = 6, fewer than 20): the interval says little"
    one = said(row(0, ends=None, prompts=1, runs=1), row(400, 1.0, None, prompts=1, runs=1))
    assert one == [
        "win rate 100.0% over 1 prompt x 1 sample, at step 400",
        "score 1.05 before, 1.25 after: difference +0.2",
        "too few prompts (n = 1): figures of one prompt have no interval",
    ]


def test_shown_prompts_are_spread_over_the_file():
    assert spread(100, 4) == [0, 33, 66, 99]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(1, 8) == [0]
    assert spread(6, 1) == [0]
