"""The step against Adam written out in NumPy, and its promises on memory, tracing and values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sysdpo_jax import Aux, DirectObjective
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    OptimizerError,
    create_state,
    ema_params,
    make_optimizer,
    make_train_step,
)
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(5)
BETA, RATE = 0.5, 0.02
ADAM = ComponentOptimizer(optax.adam(RATE))


def three(a=ADAM, b=ADAM, c=FROZEN, ema=None):
    return make_optimizer({"a": a, "b": b, "c": c}, ema)


def start(optimizer, params=None):
    params = CHAIN.init(KEY) if params is None else params
    return create_state(CHAIN, params, optimizer), make_train_step(CHAIN, DirectObjective(BETA), optimizer)


def written_out(params, reference, batch, clips):
    """Loss, clipped gradients and norms of the chain's two trained nodes in float64 NumPy, by hand.

    d/d kernel of sum_k w_k log N(v; u W + b, 1) is w_k u^T (v - u W - b); the loss's derivative by the margin m is
    -beta sigmoid(-beta m) / batch (arXiv 2305.18290, section 4).
    """
    margin, parts = 0.0, {}
    for name, weight in (("a", 1.0), ("b", 2.0)):
        for sign, side in ((1, batch.chosen), (-1, batch.rejected)):
            value, parents = (np.asarray(side[name][k], np.float64) for k in ("value", "parents"))
            error = value - parents @ params[name]["kernel"] - params[name]["bias"]
            base = value - parents @ reference[name]["kernel"] - reference[name]["bias"]
            margin = margin + sign * weight * 0.5 * ((base**2).sum(-1) - (error**2).sum(-1))
            parts[name, sign] = weight * sign, parents, error
    slope = -BETA / (1 + np.exp(BETA * margin)) / len(margin)
    gradients, norms = {}, {}
    for name, limit in clips.items():
        sides = [parts[name, sign] for sign in (1, -1)]
        kernel = sum(w * np.einsum("bi,bj,b->ij", u, e, slope) for w, u, e in sides)
        bias = sum(w * np.einsum("bj,b->j", e, slope) for w, u, e in sides)
        norms[name] = np.sqrt((kernel**2).sum() + (bias**2).sum())
        scale = min(1.0, limit / norms[name])
        gradients[name] = {"kernel": kernel * scale, "bias": bias * scale}
    return np.mean(np.log1p(np.exp(-BETA * margin))), gradients, norms


def test_two_steps_are_adam_with_clipping_written_out():
    """1e-6: float32 rounding of numbers of order 1; component a is clipped, b is not."""
    clips = {"a": 0.05, "b": 1e3}
    optimizer = three(*(ComponentOptimizer(optax.adam(RATE), clip_norm=limit) for limit in clips.values()))
    state, step = start(optimizer)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    reference, batch = params, pairs(16)
    m = jax.tree.map(np.zeros_like, {k: params[k] for k in clips})
    v = jax.tree.map(np.zeros_like, m)
    for t in (1, 2):
        loss, gradients, norms = written_out(params, reference, batch, clips)
        m = jax.tree.map(lambda old, g: 0.9 * old + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda old, g: 0.999 * old + 0.001 * g * g, v, gradients)
        new = jax.tree.map(
            lambda p, mm, vv, t=t: p - RATE * (mm / (1 - 0.9**t)) / (np.sqrt(vv / (1 - 0.999**t)) + 1e-8),
            {k: params[k] for k in clips}, m, v,
        )  # fmt: skip
        params = params | new
        state, metrics = step(state, batch, KEY)
        assert norms["a"] > clips["a"]
        np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
        for name in clips:
            np.testing.assert_allclose(metrics[f"grad_norm/{name}"], norms[name], rtol=2e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), dict(state.params), dict(params))
    assert int(state.step) == 2


def test_step_zero_has_no_reward_and_loss_ln_2():
    state, step = start(three())
    _, metrics = step(state, pairs(8), KEY)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-7)
    assert float(metrics["rewards/margins"]) == 0


def test_only_trained_leaves_change_and_take_optimiser_memory():
    optimizer = three(b=ComponentOptimizer(optax.adam(RATE), trainable="^kernel$"))
    params = CHAIN.init(KEY)
    before = jax.device_get(params)
    state, step = start(optimizer, params)
    assert set(state.reference) == {"a", "b"}
    assert state.reference["b"]["bias"] is None
    assert state.reference_params["b"]["bias"] is state.params["b"]["bias"]
    # Adam keeps a count and two moments of every trained leaf: (6 + 3) of a, 6 of b.
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * (9 + 6) + 2
    state, _ = step(state, pairs(8), KEY)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), dict(before), dict(jax.device_get(state.params)))
    assert changed == {
        "a": {"kernel": True, "bias": True},
        "b": {"kernel": True, "bias": False},
        "c": {"kernel": False, "bias": False},
    }
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))  # the caller's arrays live on


def test_the_changing_part_is_donated_in_place():
    """Every byte of step, trained leaves, optimiser state and average is aliased to an output."""
    optimizer = three(ema=0.9)
    state, step = start(optimizer)
    analysis = step.lower(state, pairs(8), KEY).compile().memory_analysis()
    trained = [state.params[k] for k in ("a", "b")]
    changing = jax.tree.leaves((state.step, trained, state.opt_state, state.ema))
    assert analysis.alias_size_in_bytes == sum(x.nbytes for x in changing)
    new, _ = step(state, pairs(8), KEY)
    assert all(x.is_deleted() for x in changing)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state.reference, state.params["c"], new)))


def test_an_optimizer_that_keeps_the_parameters_can_be_donated():
    """Schedule-free keeps z, which starts as the parameters: one buffer must not be donated twice."""
    state, step = start(three(a=ComponentOptimizer(optax.contrib.schedule_free_sgd(0.1))))
    for _ in range(2):
        state, metrics = step(state, pairs(8), KEY)
    assert bool(metrics["finite"])


def test_one_trace_and_one_compilation_for_all_steps():
    traces, compilations = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(name) if "backend_compile" in name else None
    )

    def objective(*args):
        traces.append(1)
        return DirectObjective()(*args)

    optimizer = three()
    state, step = create_state(CHAIN, CHAIN.init(KEY), optimizer), make_train_step(CHAIN, objective, optimizer)
    batches = [pairs(8, seed) for seed in range(4)]
    proceed = np.bool_(True)
    for seed, batch in enumerate(batches):
        state, metrics = step(state, batch, KEY, proceed)
        proceed = metrics["finite"]
        if seed == 0:
            assert compilations
            compilations.clear()
    assert len(traces) == 1
    assert compilations == []


def test_average_follows_its_formula():
    optimizer = three(ema=0.75)
    state, step = start(optimizer)
    average = np.asarray(state.params["a"]["kernel"])
    for seed in range(3):
        state, _ = step(state, pairs(8, seed), KEY)
        average = 0.75 * average + 0.25 * np.asarray(state.params["a"]["kernel"])
    np.testing.assert_allclose(ema_params(state)["a"]["kernel"], average, atol=1e-6)
    assert ema_params(state)["c"]["kernel"] is state.params["c"]["kernel"]
    with pytest.raises(ValueError, match="ema_decay"):
        ema_params(start(three())[0])


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_bad_term_changes_nothing_and_is_named(node):
    state, step = start(three(ema=0.9))
    state, _ = step(state, pairs(8), KEY)
    before = jax.device_get(state)
    bad = pairs(8)
    bad.rejected[node]["value"][3] = np.inf
    state, metrics = step(state, bad, KEY)
    assert not metrics["finite"]
    assert {name: bool(metrics[f"finite/{name}"]) for name in ("a", "b")} == {n: n != node for n in ("a", "b")}
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_a_bad_gradient_alone_names_its_component():
    """sqrt(|w|) at w = 0 has a finite value and an infinite derivative."""

    def objective(system, params, reference, batch, key):
        loss, aux = DirectObjective()(system, params, reference, batch, key)
        return loss + jnp.sqrt(jnp.abs(params["b"]["bias"])).sum(), aux

    optimizer = three()
    state, step = create_state(CHAIN, CHAIN.init(KEY), optimizer), make_train_step(CHAIN, objective, optimizer)
    state, metrics = step(state, pairs(8), KEY)
    assert np.isfinite(metrics["loss"])
    assert (int(state.step), bool(metrics["finite/a"]), bool(metrics["finite/b"])) == (0, True, False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_figures_are_computed_from_terms_and_never_from_names(accumulate):
    """Metrics that are named like the step's own figures, of no node, are logged and nothing more."""

    def objective(system, params, reference, batch, key):
        rows = jax.tree.leaves(batch)[0].mean()
        metrics = {"rewards/margins/nobody": rows * jnp.nan, "rewards/margins/b": rows, "finiteness": rows}
        return DirectObjective()(system, params, reference, batch, key)[0], Aux({"a": rows, "c": -3 * rows}, metrics)

    optimizer, batch = three(), pairs(8)
    step = make_train_step(CHAIN, objective, optimizer, accumulate=accumulate)
    state, metrics = step(create_state(CHAIN, CHAIN.init(KEY), optimizer), batch, KEY)
    assert (int(state.step), bool(metrics["finite"])) == (1, True)
    shares = {name: float(value) for name, value in metrics.items() if name.startswith("margin_share/")}
    assert shares == pytest.approx({"margin_share/a": 0.25, "margin_share/c": 0.75})
    assert {name for name in metrics if name.startswith("finite")} == {"finite", "finite/a", "finite/c", "finiteness"}
    np.testing.assert_allclose(metrics["finiteness"], np.mean(jax.tree.leaves(batch)[0]), rtol=1e-5)
    assert np.isnan(metrics["rewards/margins/nobody"])


def test_an_objective_without_terms_is_trained():
    def objective(*args):
        return DirectObjective()(*args)[0], Aux({}, {})

    optimizer = three()
    step = make_train_step(CHAIN, objective, optimizer)
    state, metrics = step(create_state(CHAIN, CHAIN.init(KEY), optimizer), pairs(8), KEY)
    assert int(state.step) == 1
    assert set(metrics) == {"loss", "finite", "grad_norm/a", "grad_norm/b", "clipped/a", "clipped/b"}


@pytest.mark.parametrize(
    ("returned", "kinds"),
    [
        (lambda loss: loss, r"\w+Tracer"),
        (lambda loss: (loss, {"loss": loss}), r"\(\w+Tracer, dict\)"),
        (lambda loss: (loss, ({}, {})), r"\(\w+Tracer, \(dict, dict\)\)"),
        (lambda loss: (loss, Aux({}, {}), {}), r"\(\w+Tracer, Aux, dict\)"),
    ],
)
def test_what_is_not_a_loss_and_aux_is_refused(returned, kinds):
    optimizer = three()
    step = make_train_step(CHAIN, lambda *args: returned(DirectObjective()(*args)[0]), optimizer)
    with pytest.raises(TypeError, match=rf"the objective returned ({kinds}): return \(loss, Aux\(terms, metrics\)\)"):
        step(create_state(CHAIN, CHAIN.init(KEY), optimizer), pairs(8), KEY)


def test_a_bad_update_changes_nothing():
    state, step = start(three(a=ComponentOptimizer(optax.sgd(float("inf")))))
    before = jax.device_get(state.params)
    state, metrics = step(state, pairs(8), KEY)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_proceed_false_changes_nothing():
    state, step = start(three())
    before = jax.device_get(state)
    state, metrics = step(state, pairs(8), KEY, np.bool_(False))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_errors_name_the_component_and_the_remedy():
    with pytest.raises(OptimizerError, match=r"missing: \['c'\]"):
        create_state(CHAIN, CHAIN.init(KEY), make_optimizer({"a": FROZEN, "b": FROZEN}))
    with pytest.raises(OptimizerError, match="train at least one"):
        make_train_step(CHAIN, DirectObjective(), three(FROZEN, FROZEN))
    with pytest.raises(OptimizerError, match="'lora' matches no parameter of 'a'"):
        create_state(CHAIN, CHAIN.init(KEY), three(a=ComponentOptimizer(optax.adam(1e-3), trainable="lora")))
    with pytest.raises(OptimizerError, match="clip_norm must be positive"):
        ComponentOptimizer(optax.adam(1e-3), clip_norm=0.0)
    with pytest.raises(OptimizerError, match="ema_decay"):
        three(ema=1.0)
    state, _ = start(three())
    with pytest.raises(ValueError, match="same mesh"):
        make_train_step(CHAIN, DirectObjective(), three())(jax.device_put(state, jax.devices()[0]), pairs(8), KEY)


def test_coarse_trained_parameters_are_warned_of():
    params = CHAIN.init(jax.random.key(0))
    params["b"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["b"])
    with pytest.warns(UserWarning, match=r"trained parameters of b have less than 32 bits.*param_dtype='float32'"):
        start(three(), params)
    # Frozen ones may be as coarse as they like: warnings are errors here.
    start(three(b=FROZEN), params)


def test_constants_are_not_trained_whatever_the_pattern():
    """With weight decay and every leaf asked for, LoRA's scale and a table of positions stay as they are."""
    params = CHAIN.init(jax.random.key(0))
    params["a"] |= {"lora_scale": jnp.ones(()), "pos_embed": jnp.ones((1, 2, 2))}
    optimizer = three(a=ComponentOptimizer(optax.adamw(0.1, weight_decay=0.5)))
    state, step = start(optimizer, params)
    state, _ = step(state, pairs(8), jax.random.key(1))
    for name in ("lora_scale", "pos_embed"):
        np.testing.assert_array_equal(state.params["a"][name], params["a"][name])
    assert (np.asarray(state.params["a"]["kernel"]) != np.asarray(params["a"]["kernel"])).all()
