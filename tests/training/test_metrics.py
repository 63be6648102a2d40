"""What a run shows: the split of the margin, drift, clipping, warnings in words, and where rows are sent."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    Evaluation,
    MetricsLog,
    Trainer,
    create_state,
    make_optimizer,
    make_train_step,
    read_metrics,
)
from sysdpo_jax.training.metrics import SHARE, WINDOW, MetricWarnings
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(3)
OPTIMIZER = make_optimizer(
    {
        "a": ComponentOptimizer(optax.adam(1e-2), clip_norm=0.05),
        "b": ComponentOptimizer(optax.adam(1e-2), clip_norm=None),
        "c": FROZEN,
    }
)


def moved_state():
    """A policy that is not its reference, in float64 beside the state: {node: (policy, reference)}."""
    state = create_state(CHAIN, CHAIN.init(KEY), OPTIMIZER)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), state.params)
    both = {k: jax.tree.map(lambda x: np.asarray(x, np.float64), (params[k], state.reference[k])) for k in ("a", "b")}
    return state._replace(trained=state.trained | {k: params[k] for k in ("a", "b")}), both


def log_ratios(both, side, name):
    """log N(v; u W + b, 1) under the policy minus that under the reference."""
    value, parents = (np.asarray(side[name][k], np.float64) for k in ("value", "parents"))
    policy, reference = (-0.5 * ((value - parents @ p["kernel"] - p["bias"]) ** 2).sum(-1) for p in both[name])
    return policy - reference


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_split_of_a_step_written_out(accumulate):
    """1e-5: float32 sums of log-ratios of order 1 to 10. Shares are of the batch, not means over its parts."""
    state, both = moved_state()
    batch = pairs(16)
    step = make_train_step(CHAIN, DirectObjective(0.5), OPTIMIZER, accumulate=accumulate)
    metrics = jax.device_get(step(state, batch, KEY)[1])
    ratios = {name: [log_ratios(both, side, name) for side in (batch.chosen, batch.rejected)] for name in ("a", "b")}
    margins = {name: abs(weight * (ratios[name][0] - ratios[name][1]).mean()) for name, weight in (("a", 1), ("b", 2))}
    for name in ("a", "b"):
        np.testing.assert_allclose(metrics[f"margin_share/{name}"], margins[name] / sum(margins.values()), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"drift/kl/{name}"], np.square(ratios[name]).mean() / 2, rtol=1e-5)
    assert metrics["grad_norm/a"] > 0.05
    assert (metrics["clipped/a"], "clipped/b" in metrics, "clipped/c" in metrics) == (1, False, False)


def test_no_margin_has_no_shares():
    state = create_state(CHAIN, CHAIN.init(KEY), OPTIMIZER)
    metrics = make_train_step(CHAIN, DirectObjective(), OPTIMIZER)(state, pairs(8), KEY)[1]
    assert [float(metrics[f"{name}/{node}"]) for name in ("margin_share", "drift/kl") for node in "ab"] == [0.0] * 4


def row(step, a=1.0, b=1.0, chosen=0.5):
    return {"step": step, "rewards/margins/a": a, "rewards/margins/b": b, "rewards/chosen": chosen,
            "rewards/chosen/a": 0.5, "rewards/chosen/b": chosen - 0.5}  # fmt: skip


def given(rows, watch=None):
    watch = watch or MetricWarnings("ab")
    return {r["step"]: texts for r in rows if (texts := watch.see(r))}


def test_a_node_that_carries_the_margin_is_named_once():
    heavy = SHARE / (1 - SHARE)
    assert given([row(k, b=heavy * 0.99) for k in range(3 * WINDOW)]) == {}
    found = given([row(2 * k, b=-heavy * 1.01) for k in range(3 * WINDOW)])
    assert list(found) == [2 * (WINDOW - 1)]
    [text] = found[18]
    assert text.startswith("steps 0 to 18: the node 'b' carries 95.0% of the margin")
    # Of the window's mean: noise that changes its sign is no margin.
    noisy = [row(k, a=0.01, b=(-1.0) ** k) for k in range(WINDOW)]
    assert "the node 'a' carries 100.0%" in given(noisy)[WINDOW - 1][0]
    alone = [{"step": k, "rewards/chosen": 1.0, "rewards/margins/a": 1.0} for k in range(WINDOW)]
    assert given(alone) == {}
    assert given([row(k, a=0.0, b=0.0) for k in range(WINDOW)]) == {}


def test_falling_likelihood_is_told_once_it_stays_below_zero():
    rows = [row(k, chosen=-0.1 if k != 4 else 0.1) for k in range(40)]
    found = given(rows)
    assert list(found) == [4 + WINDOW]
    assert found[14] == [
        "steps 5 to 14: rewards/chosen is below 0, -0.1 in the mean: the policy gives the chosen values less "
        "probability than the reference does, in 'b': add an sft term for the node, lower the learning rate, or raise "
        "beta"
    ]
    assert given(rows[20:], MetricWarnings("ab", rows[:20])) == {}
    assert list(given(rows[10:], MetricWarnings("ab", rows[:10]))) == [14]
    unknown = [row(k, chosen=-0.1) | ({"rewards/chosen": None} if k == 5 else {}) for k in range(WINDOW)]
    assert given([*unknown, {"step": 10, "eval/x": 1.0}]) == {}


def test_warnings_are_in_the_log_and_on_standard_error(tmp_path, capsys):
    for start, end in ((0, 12), (12, 30)):
        with MetricsLog(tmp_path, start, nodes=("a", "b")) as log:
            for k in range(start, end):
                log.write(k, {n: v for n, v in row(k, chosen=-1.0).items() if n != "step"})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(30))
    [(step, texts)] = [(r["step"], r["warnings"]) for r in rows if "warnings" in r]
    assert (step, len(texts)) == (9, 1)
    assert capsys.readouterr().err == f"warning: {texts[0]}\n"


def test_what_was_evaluated_at_the_checkpoint_stays_and_is_shown_again(tmp_path, monkeypatch):
    shown = []

    class Shown:
        def __init__(self, directory, purge):
            shown.extend([f"purge {purge}"] if purge else [])

        def scalars(self, values, step):
            shown.extend((name, step) for name in values)

        def close(self):
            pass

    monkeypatch.setattr("sysdpo_jax.training.metrics.Events", Shown)
    with MetricsLog(tmp_path, 0) as log:
        for step, name in ((0, "eval/x"), (0, "loss"), (4, "eval/x"), (4, "loss"), (5, "loss")):
            log.write(step, {name: 1.0})
    with MetricsLog(tmp_path, 4) as log:
        assert log.evaluations == [{"step": 0, "eval/x": 1.0}, {"step": 4, "eval/x": 1.0}]
    assert [(r["step"], "loss" in r) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (0, False), (0, True), (4, False)]  # fmt: skip
    # TensorBoard hides what it has of step 4 and later.
    assert shown == [*[("eval/x", 0), ("loss", 0), ("eval/x", 4), ("loss", 4), ("loss", 5)], "purge 4", ("eval/x", 4)]
    with MetricsLog(tmp_path, 0) as log:
        assert log.evaluations == []


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module that keeps what it is told."""
    module = SimpleNamespace(runs=[], calls=[])

    def init(**settings):
        module.runs.append(settings)
        return SimpleNamespace(
            define_metric=lambda *args, **kwargs: module.calls.append(("metric", args, kwargs)),
            log=lambda row: module.calls.append(("log", row)),
            finish=lambda exit_code: module.calls.append(("finish", exit_code)),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def fitted(directory, steps, **settings):
    optimizer = OPTIMIZER
    state = create_state(CHAIN, CHAIN.init(KEY), optimizer)
    trainer = Trainer(CHAIN, DirectObjective(), optimizer, directory, **settings)
    return trainer.fit(state, epoch_batches(pairs(16), 8, seed=0), steps, KEY)


def test_weights_and_biases_get_the_rows_of_one_run_by_their_steps(tmp_path, wandb):
    for steps in (2, 4):
        fitted(tmp_path, steps, wandb={"project": "p", "mode": "offline"}, config={"rate": 0.1})
    identity = wandb.runs[0]["id"]
    settings = {"dir": str(tmp_path), "id": identity, "resume": "allow", "config": {"rate": 0.1}}
    assert wandb.runs == [settings | {"project": "p", "mode": "offline"}] * 2
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert logged == read_metrics(tmp_path / "metrics.jsonl")
    assert [call for call in wandb.calls if call[0] == "metric"][1] == ("metric", ("*",), {"step_metric": "step"})
    assert [call[1] for call in wandb.calls if call[0] == "finish"] == [0, 0]


def test_weights_and_biases_that_are_absent_say_so_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
        MetricsLog(tmp_path, 0, {})
    with MetricsLog(tmp_path, 0):
        pass


def test_every_metric_is_documented(tmp_path):
    """The names in the first column of docs/metrics.md, of a run with all of them but speed on known devices."""
    fitted(tmp_path, 2, evaluation=Evaluation(lambda step, params: {"x": 1.0}, 2))
    text = Path(__file__).parents[2].joinpath("docs", "metrics.md").read_text(encoding="utf-8")
    names = [
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall("`(.*?)`", line.split(" | ")[0])
    ]
    known = [re.sub("<.*?>", r"[^/]+", name) for name in names]
    logged = {name for r in read_metrics(tmp_path / "metrics.jsonl") for name in r} - {"step"}
    assert [name for name in sorted(logged) if not any(re.fullmatch(pattern, name) for pattern in known)] == []
