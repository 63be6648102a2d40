"""SysDPO-Sampling against enumeration in NumPy, its limits, and systems of every kind of component."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    DirectObjective,
    GraphError,
    Node,
    PairBatch,
    PreferenceRecord,
    SamplingObjective,
    prepare_pairs,
    sampled_batch,
    without_intermediates,
)
from sysdpo_jax.objectives import LOSSES
from sysdpo_jax.objectives.objective import require_batch
from tests.components.drawn import drawn
from tests.objectives.mixtures import KEY, system_of

INNER = ("language model, diffusion", "language model, categorical, gaussian")
CHAIN = CompoundSystem(
    ("x",), (Node("y", Categorical(5, (2,)), ("x",), weight=0.7), Node("z", Categorical(3, (5,)), ("y",), weight=1.3))
)
RECORDS = [
    PreferenceRecord({"x": x}, {"z": z}, {"z": other})
    for x in range(2)
    for z in range(3)
    for other in range(3)
    if z != other
]
EVERY = [[{"y": y} for y in range(5)]] * len(RECORDS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluated(objective, system, params, reference, batch):
    """Run operation by operation, every test would compile dozens of programs."""
    return objective(system, params, reference, batch, KEY)


def loss_of(params, reference, batch):
    return evaluated(SamplingObjective(0.5), CHAIN, params, reference, batch)[0]


def chain():
    return tuple(CHAIN.init(jax.random.key(seed)) for seed in (3, 4))


def enumerated(params, reference):
    """[records] log p(z|x) / p_ref(z|x) of both sides, summed over all y with the nodes' weights, in float64."""

    def outcome(tree):
        tables = [np.asarray(jax.nn.log_softmax(tree[name]["logits"]), np.float64) for name in "yz"]
        return np.log(np.exp(0.7 * tables[0]) @ np.exp(1.3 * tables[1]))

    ratio = outcome(params) - outcome(reference)
    rows = [r.inputs["x"] for r in RECORDS]
    return ratio[rows, [r.chosen["z"] for r in RECORDS]], ratio[rows, [r.rejected["z"] for r in RECORDS]]


@pytest.mark.parametrize("loss", LOSSES)
def test_with_all_intermediates_it_equals_enumeration(loss):
    """Float32 against float64 on ratios of order 1: 1e-5."""
    params, reference = chain()
    batch = sampled_batch(CHAIN, RECORDS, EVERY, 5)
    value, (_, metrics) = evaluated(SamplingObjective(0.5, loss), CHAIN, params, reference, batch)
    chosen, rejected = enumerated(params, reference)
    expected = LOSSES[loss](jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), 0.5, 0.0)
    np.testing.assert_allclose(value, expected.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.5 * chosen.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.5 * (chosen - rejected).mean(), atol=1e-5)
    assert metrics["rewards/accuracies"] == np.mean(chosen > rejected)


def test_the_gradient_equals_finite_differences_of_the_enumeration():
    """Central differences in float64 with a step of 1e-4: good to 1e-6; float32 gradients of order 0.1 to 1e-5."""
    params, reference = chain()
    batch = sampled_batch(CHAIN, RECORDS, EVERY, 5)
    gradient = jax.jit(jax.grad(loss_of))(params, reference, batch)

    def loss(name, place, change):
        # Float64 before the change: in float32 it would drown.
        moved = {key: {"logits": np.asarray(tree["logits"], np.float64)} for key, tree in params.items()}
        moved[name]["logits"][place] += change
        with jax.enable_x64(True):
            chosen, rejected = enumerated(moved, reference)
        return np.log1p(np.exp(-0.5 * (chosen - rejected))).mean()

    for name in "yz":
        for place in np.ndindex(params[name]["logits"].shape):
            slope = (loss(name, place, 1e-4) - loss(name, place, -1e-4)) / 2e-4
            np.testing.assert_allclose(gradient[name]["logits"][place], slope, atol=1e-5)


def test_some_intermediates_are_a_sum_over_these_alone():
    params, reference = chain()
    kept = [0, 3]
    batch = sampled_batch(CHAIN, RECORDS, [[{"y": y} for y in kept]] * len(RECORDS), 4)
    _, (_, metrics) = evaluated(SamplingObjective(1.0), CHAIN, params, reference, batch)

    def outcome(tree):
        tables = [np.asarray(jax.nn.log_softmax(tree[name]["logits"]), np.float64) for name in "yz"]
        return np.log(np.exp(0.7 * tables[0][:, kept]) @ np.exp(1.3 * tables[1][kept]))

    ratio, logp = outcome(params) - outcome(reference), outcome(params)
    rows, won = [r.inputs["x"] for r in RECORDS], [r.chosen["z"] for r in RECORDS]
    np.testing.assert_allclose(metrics["rewards/chosen"], ratio[rows, won].mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["logps/chosen"], logp[rows, won].mean(), atol=1e-5)
    assert metrics["intermediates/distinct"] == 2


def test_duplicates_carry_no_weight():
    params, reference = chain()
    once = [[{"y": 4}, {"y": 1}, {"y": 2}]] * len(RECORDS)
    again = [[{"y": 4}, {"y": 4}, {"y": 1}, {"y": 4}, {"y": 2}]] * len(RECORDS)
    results = [
        evaluated(SamplingObjective(0.5), CHAIN, params, reference, sampled_batch(CHAIN, RECORDS, sets, number))
        for sets, number in ((once, 3), (again, 5))
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, value in results[0][1].metrics.items():
        np.testing.assert_allclose(value, results[1][1].metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def mixture(name):
    """System, policy, reference, and pairs whose sides share the intermediates of one run."""
    # A picture's surrogate of 1e4 nats would leave one intermediate with all the weight.
    scale = {"image": 1e-4}
    nodes = tuple(replace(node, weight=scale.get(node.name, node.weight)) for node in system_of(name).nodes)
    system = CompoundSystem(("x",), nodes)
    params, reference = (drawn(system.init, seed) for seed in (3, 4))
    inputs = [{"x": x} for x in ("a ball", "red", "the cube", "small")]
    first, second, more = (system.sample(params, inputs, jax.random.key(seed)) for seed in (1, 2, 5))
    inner, outer = ([node.name for node in nodes] for nodes in (system.intermediates, system.outputs))
    records = [
        PreferenceRecord(
            row,
            {k: run[k] for k in (*inner, *outer)},
            {k: run[k] for k in inner} | {k: other[k] for k in outer},
        )
        for row, run, other in zip(inputs, first, second, strict=True)
    ]
    sets = [[{k: run[k] for k in inner} for run in runs] for runs in zip(first, second, more, strict=True)]
    return system, params, reference, records, sets


def close(gradient, expected):
    """Within 1e-5 of the largest entry: float32 gradients that were summed in another order."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), gradient, expected)


@pytest.mark.parametrize("name", [pytest.param(INNER[0], marks=pytest.mark.slow), INNER[1]])
def test_with_one_intermediate_it_is_direct(name):
    """The sums are the same; XLA may fuse the extra axis differently, within float32's rounding of each sum."""
    system, params, reference, records, sets = mixture(name)
    anchor = (system.intermediates[0].name, 0.1), (system.outputs[0].name, 0.2)
    settings = {"beta": 0.1, "label_smoothing": 0.1, "sft": anchor}
    single = sampled_batch(system, without_intermediates(system, records), [kept[:1] for kept in sets], 1)
    found, known = (
        jax.jit(jax.value_and_grad(kind(**settings), argnums=1, has_aux=True), static_argnums=0)
        for kind in (SamplingObjective, DirectObjective)
    )
    (loss, (_, metrics)), gradient = found(system, params, reference, single, KEY)
    (expected, (_, wanted)), slope = known(system, params, reference, prepare_pairs(system, records), KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    close(gradient, slope)
    # The only others are the winner's and loser's log-probabilities, which count a node's weight here.
    for key in wanted.keys() - {"logps/chosen", "logps/rejected"}:
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_with_one_intermediate_it_is_direct_to_the_bit():
    """On tables nothing is fused in another way: the formula itself loses nothing."""
    params, reference = chain()
    records = [
        PreferenceRecord(r.inputs, {"y": i % 5, **r.chosen}, {"y": i % 5, **r.rejected}) for i, r in enumerate(RECORDS)
    ]
    single = sampled_batch(CHAIN, RECORDS, [[{"y": r.chosen["y"]}] for r in records], 1)
    found = SamplingObjective(0.5)(CHAIN, params, reference, single, KEY)
    wanted = DirectObjective(0.5)(CHAIN, params, reference, prepare_pairs(CHAIN, records), KEY)
    assert found[0] == wanted[0]
    assert found[1].metrics["rewards/margins"] == wanted[1].metrics["rewards/margins"]


@pytest.mark.parametrize("name", INNER[:1])
def test_step_zero_is_ln_2_and_the_gradient_reaches_every_component(name):
    """All intermediates see the same noise, so the ratios are 0 within float32's rounding of sums of order 10."""
    system, params, _, records, sets = mixture(name)
    batch = sampled_batch(system, without_intermediates(system, records), sets, 3)
    objective = jax.value_and_grad(SamplingObjective(0.1), argnums=1, has_aux=True)
    (loss, (_, metrics)), gradient = jax.jit(objective, static_argnums=0)(system, params, params, batch, KEY)
    assert abs(loss - math.log(2)) < 1e-6
    assert 1 <= metrics["intermediates/effective/chosen"] <= 3
    for key, tree in gradient.items():
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) > 0, key


def test_chunks_change_nothing_but_memory():
    """Chunks of 2, which does not divide 11. The same sums in another order of evaluation: float32's rounding.

    The bytes of temporaries are the compiler's; all eleven at once need several times those of two.
    """
    system, params, reference, records, sets = mixture("language model, categorical, gaussian")
    batch = sampled_batch(system, without_intermediates(system, records), sets, 11)
    batch = batch._replace(valid=np.ones_like(batch.valid))

    def run(size):
        objective = jax.value_and_grad(SamplingObjective(0.1, chunk_size=size), argnums=1, has_aux=True)
        compiled = jax.jit(objective, static_argnums=0).lower(system, params, reference, batch, KEY).compile()
        return compiled(params, reference, batch, KEY), compiled.memory_analysis().temp_size_in_bytes

    ((loss, (_, metrics)), gradient), bounded = run(2)
    ((expected, (_, wanted)), slope), whole = run(None)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # Which side of a pair is the larger one may depend on the rounding where both are nearly equal.
    for key in wanted.keys() - {"rewards/accuracies"}:
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)
    close(gradient, slope)
    assert bounded < whole / 2.5


def test_a_frozen_component_weighs_the_intermediates():
    """Its ratio is 0, but p(y | x) says which y the second one is trained on."""
    params, reference = chain()
    mixed = {"y": reference["y"], "z": params["z"]}
    batch = sampled_batch(CHAIN, RECORDS, EVERY, 5)
    loss, (terms, metrics) = evaluated(SamplingObjective(0.5), CHAIN, mixed, {"z": reference["z"]}, batch)
    chosen, rejected = enumerated(mixed, reference)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-0.5 * (chosen - rejected))).mean(), atol=1e-5)
    assert "rewards/margins/y" not in metrics
    assert terms.keys() == {"z"}
    gradient = jax.jit(jax.grad(loss_of))(mixed, {"z": reference["z"]}, batch)
    assert not gradient["y"]["logits"].any()
    assert gradient["z"]["logits"].any()
    with pytest.raises(GraphError, match="every component is frozen"):
        SamplingObjective()(CHAIN, params, {}, batch, KEY)


def test_no_gradient_reaches_the_reference():
    params, reference = chain()
    batch = sampled_batch(CHAIN, RECORDS, EVERY, 5)
    gradient = jax.jit(jax.grad(loss_of, argnums=1))(params, reference, batch)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("gap", "effective"), [(0.0, 5.0), (30.0, 1.0), (math.log(2), 36 / 8)])
def test_the_effective_number_of_intermediates(gap, effective):
    """p(y) is 1 for four values and e^gap for the fifth: (4 + e^g)^2 / (4 + e^2g); z says nothing of y."""
    system = CompoundSystem(("x",), (Node("y", Categorical(5, (1,)), ("x",)), Node("z", Categorical(2, (5,)), ("y",))))
    params = {"y": {"logits": jnp.array([[gap, 0.0, 0.0, 0.0, 0.0]])}, "z": {"logits": jnp.zeros((5, 2))}}
    batch = sampled_batch(system, [PreferenceRecord({"x": 0}, {"z": 0}, {"z": 1})], EVERY[:1], 5)
    _, (_, metrics) = evaluated(SamplingObjective(), system, params, params, batch)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(metrics[f"intermediates/effective/{side}"], effective, rtol=1e-5)


def test_an_intermediate_of_probability_0_has_no_weight():
    """The same loss and gradients as without it, where log p - log p_ref would be infinity less infinity."""
    never = np.zeros((2, 5))
    never[:, 4] = -np.inf
    params, reference = ({"y": {"logits": t["y"]["logits"] + never}, "z": t["z"]} for t in chain())
    step = jax.jit(jax.value_and_grad(loss_of))
    loss, gradient = step(params, reference, sampled_batch(CHAIN, RECORDS, EVERY, 5))
    expected, slope = step(params, reference, sampled_batch(CHAIN, RECORDS, [sets[:4] for sets in EVERY], 5))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    close(gradient, slope)


def test_bad_settings_and_batches_are_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        SamplingObjective(chunk_size=0)
    with pytest.raises(ValueError, match="unknown loss 'dpo'"):
        SamplingObjective(loss="dpo")
    batch = sampled_batch(CHAIN, RECORDS, EVERY, 5)
    with pytest.raises(TypeError, match="takes a PairBatch, as prepare_pairs makes it, not a SampledBatch"):
        require_batch(batch, PairBatch, "prepare_pairs")
