"""Online rounds on a system that can be enumerated: what they reach, how they end, and where they go on."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import sysdpo_jax as sj
from sysdpo_jax.data.batches import PreferenceBatches
from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.runs.rounds import RoundStore
from sysdpo_jax.training import EvaluationError, read_metrics

QUESTIONS, ROUTES, ANSWERS = 3, 3, 4
SYSTEM = sj.CompoundSystem(
    ("question",),
    (
        sj.Node("route", sj.Categorical(ROUTES, (QUESTIONS,)), ("question",)),
        sj.Node("answer", sj.Categorical(ANSWERS, (ROUTES,)), ("route",)),
    ),
)
PROMPTS = [{"question": question} for question in range(QUESTIONS)]
# What an answer is worth to a question: the best is worth 1.
WORTH = np.array([[1.0, 0.5, 0.2, 0.0], [0.0, 1.0, 0.4, 0.3], [0.3, 0.1, 0.2, 1.0]])


def worth(run):
    return WORTH[run["question"], run["answer"]]


def right(run):
    return run["answer"] == WORTH[run["question"]].argmax()


def expected(params):
    """The exact mean score over questions: every run is enumerated, with its probability."""
    total = 0.0
    for question in range(QUESTIONS):
        runs = [{"question": question, "route": r, "answer": a} for r in range(ROUTES) for a in range(ANSWERS)]
        features = SYSTEM.prepare(runs)
        log_probs = SYSTEM.log_prob(params, features, jax.random.key(0))
        weights = np.exp(sum(np.asarray(each, np.float64) for each in log_probs.values()))
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        total += weights @ np.array([worth(run) for run in runs]) / QUESTIONS
    return total


def optimizer(rate):
    return sj.make_optimizer({name: sj.ComponentOptimizer(optax.adam(rate)) for name in ("route", "answer")})


ROUNDS = sj.Rounds(number=3, samples=64, sample_batch=96, group=8, pairs="all", steps=30, batch_size=64, epochs=None)
RUNS, HELD_OUT = 3 * 64, 3 * 16


def trainer(folder, rate=0.1, **changes):
    return sj.Trainer(SYSTEM, sj.DirectObjective(beta=0.5), optimizer(rate), folder, checkpoint_every=10, **changes)


def first():
    return SYSTEM.init(jax.random.key(0))


def trained(folder, rounds=ROUNDS, scorer=worth, figures=None, own=None, **changes):
    figures = {"right": right} if figures is None else figures
    own = trainer(folder) if own is None else own
    return sj.online(own, first(), PROMPTS, scorer, rounds, **HELD | {"figures": figures} | changes)


HELD = {"held_out": PROMPTS, "held_out_samples": 16}


def same(one, other):
    leaves = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return leaves[0] == leaves[1]


def rows_of(folder):
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("throughput/", "memory/"))} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three rounds, undisturbed: the folder and the result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, trained(folder)


def test_rounds_raise_the_exact_expected_score(whole):
    """In each of them, by enumeration, to nearly the highest that a table can reach through three routes: 1."""
    folder, result = whole
    store, current, scores = RoundStore(trainer(folder), ROUNDS, 0), first(), [expected(first())]
    for number in (1, 2, 3):
        current, _ = store.restored_round(number, first(), current)
        scores.append(expected(current))
    print(scores)
    assert scores[0] < 0.55
    assert all(later > earlier for earlier, later in itertools.pairwise(scores))
    assert scores[3] > 0.85
    held_out = [(row["eval/score"], row["step"]) for row in rows_of(folder) if "eval/score" in row]
    assert result.step == max(held_out)[1]
    assert [(each.first, each.last) for each in result.rounds] == [(0, 30), (30, 60), (60, 90)]


def test_the_rounds_have_one_axis_of_steps_and_one_file_of_metrics(whole):
    folder, _ = whole
    rows = rows_of(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(90))
    evaluated = {row["step"]: row for row in rows if "eval/score" in row}
    assert list(evaluated) == [0, 30, 60, 90]
    assert all(row["eval/right/low"] <= row["eval/right"] <= row["eval/right/high"] for row in evaluated.values())
    # The reference is the policy that a round begins with: its first loss is ln 2.
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [losses[step] for step in (0, 30, 60)] == pytest.approx([np.log(2)] * 3, abs=1e-6)


class Counting:
    """A scorer that counts its calls, and fails at one of them."""

    def __init__(self, end=None):
        self.calls, self.end = 0, end

    def __call__(self, run):
        if self.calls == self.end:
            raise ConnectionError("gone")
        self.calls += 1
        return worth(run)


def test_what_stopped_goes_on_to_the_same_end_and_nothing_is_scored_twice(whole, tmp_path, monkeypatch):
    """Stopped while scoring round 1, in its training, between rounds, and in an evaluation."""
    folder, result = whole
    calls, counted = 0, RUNS + 2 * HELD_OUT + 5
    for end in (50, counted):
        scorer = Counting(end - calls)
        with pytest.raises((ScoreError, EvaluationError), match="gone"):
            trained(tmp_path, scorer=scorer)
        calls += scorer.calls

    with monkeypatch.context() as patched:
        batch = PreferenceBatches.__getitem__
        patched.setattr(PreferenceBatches, "__getitem__", lambda own, step: 1 / 0 if step == 47 else batch(own, step))
        scorer = Counting()
        with pytest.raises(ZeroDivisionError):
            trained(tmp_path, scorer=scorer)
    last = Counting()
    again = trained(tmp_path, scorer=last)
    assert calls + scorer.calls + last.calls == 3 * RUNS + 4 * HELD_OUT
    assert again.step == result.step
    assert again.rounds == result.rounds
    assert same(again.params, result.params)
    assert rows_of(tmp_path) == rows_of(folder)


def test_more_rounds_go_on_where_fewer_ended(whole, tmp_path):
    _, result = whole
    fewer = trained(tmp_path, replace(ROUNDS, number=1), Counting())
    assert [each.last for each in fewer.rounds] == [30]
    scorer = Counting()
    more = trained(tmp_path, scorer=scorer)
    assert scorer.calls == 2 * RUNS + 2 * HELD_OUT
    assert more.rounds == result.rounds
    assert same(more.params, result.params)
    # All is done: nothing is scored, and the same is returned.
    assert same(trained(tmp_path, scorer=Counting(0)).params, result.params)


def test_a_figure_that_falls_ends_the_rounds_and_the_best_is_what_counts(tmp_path):
    """The other figure falls as the score rises; a prompt that is there eight times makes the error small."""
    rounds = replace(ROUNDS, stop_on=("other", "score"))
    given = {"figures": {"other": lambda run: -worth(run)}, "held_out": PROMPTS * 8, "held_out_samples": 4}
    result = trained(tmp_path, rounds, **given)
    assert "other on held-out prompts changed by -0." in result.stopped
    assert "since step 0" in result.stopped
    assert (len(result.rounds), result.step) == (2, 0)
    assert same(result.params, first())
    assert same(trained(tmp_path, replace(rounds, number=9), **given).params, first())


def test_a_fall_within_the_noise_ends_the_rounds_where_it_is_too_far(tmp_path):
    """One held-out prompt has no interval, so that only `fall` ends the rounds."""
    figures = {"other": lambda run: -worth(run)}
    one = {"held_out": PROMPTS[:1], "figures": figures}
    rounds = replace(ROUNDS, number=2, stop_on=("score", "other"))
    assert trained(tmp_path / "noise", rounds, **one).stopped is None
    stopped = trained(tmp_path / "fall", replace(rounds, fall=0.01), **one)
    assert stopped.stopped is not None
    assert len(stopped.rounds) == 1


def test_patience_ends_the_run_within_a_round(tmp_path):
    rounds = replace(ROUNDS, stop_on=("flat",))
    made = trained(tmp_path, rounds, figures={"flat": lambda run: 1.0}, every=10, patience=2)
    assert made.stopped == "eval/flat was no better in 2 evaluations"
    assert [each.last for each in made.rounds] == [20]


def test_a_kept_reference_is_that_of_the_first_round(tmp_path):
    trained(tmp_path, replace(ROUNDS, number=2, reference="keep"))
    losses = {row["step"]: row["loss"] for row in rows_of(tmp_path) if "loss" in row}
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    # The policy has moved away from the first one, along its preferences.
    assert losses[30] < losses[0] - 0.02


def test_a_share_of_the_pairs_is_of_earlier_rounds(tmp_path):
    result = trained(tmp_path, replace(ROUNDS, number=2, mix=0.25))
    [one, two] = result.rounds
    assert one.earlier == 0
    assert two.earlier == round((two.pairs - two.earlier) / 3)
    lines = [(tmp_path / f"round-{n}" / "preferences.jsonl").read_text().splitlines() for n in (1, 2)]
    assert set(lines[1][-two.earlier :]) <= set(lines[0])
    assert json.loads(lines[1][0])["chosen"].keys() == {"route", "answer"}


def test_other_settings_are_refused_by_name(whole):
    folder, _ = whole
    with pytest.raises(ConfigError, match=r"online.json is of another run \(rounds.mix was 0.0, now 0.5\)"):
        trained(folder, replace(ROUNDS, mix=0.5))
    with pytest.raises(ConfigError, match=r"runs scorer was .*test_online:worth, now .*test_online:right"):
        trained(folder, scorer=right)
    with pytest.raises(ConfigError, match="stop_on 'wrong' is no held-out figure: choose among score, right"):
        trained(folder, replace(ROUNDS, stop_on=("wrong",)))


def test_rounds_without_pairs_are_said_to_be_so(tmp_path):
    with pytest.raises(ConfigError, match="round 1: no two runs of a prompt differ by 2 or more: sample more"):
        trained(tmp_path / "none", replace(ROUNDS, min_margin=2.0))
    with pytest.raises(ConfigError, match=r"round 1 has [0-9]+ pairs, and a step takes 672: give more prompts"):
        trained(tmp_path / "few", replace(ROUNDS, batch_size=672))
    # Of 3 questions and 8 groups of 8 runs: 3 * 8 * 28.
    with pytest.raises(ConfigError, match="3 prompts with 64 runs each give 672 pairs at most, and a step takes 673"):
        trained(tmp_path / "fewer", replace(ROUNDS, batch_size=673))
    # Nothing that would refuse the same folder with what the message asks for.
    assert not [path for path in (tmp_path / "fewer").rglob("*") if path.is_file()]
    sj.Rounds(samples=7, group=3, batch_size=4).check_prompts(2)
    with pytest.raises(ConfigError, match="give 4 pairs at most, and a step takes 5"):
        sj.Rounds(samples=7, group=3, batch_size=5).check_prompts(2)
    for wrong in ({"samples": 1}, {"mix": 1.0}, {"number": 0}, {"fall": 0.0}, {"stop_on": ()}):
        with pytest.raises(ConfigError, match=f"rounds: {next(iter(wrong))}"):
            sj.Rounds(**wrong)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "online.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/online.md", "exec"), {"__name__": "rounds_example"})
    step, scores, stopped = re.fullmatch(r"(\d+) \[(.*)\] (\w+)", capsys.readouterr().out.strip()).groups()
    first, second = map(float, scores.split(", "))
    assert (int(step) in (30, 60), stopped) == (True, "None")
    assert first < second
