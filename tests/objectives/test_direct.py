"""SysDPO-Direct on systems of every kind of component: what must hold whatever the models are."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import DirectObjective, GraphError, PairBatch, log_ratio
from tests.components.drawn import drawn
from tests.objectives import mixtures
from tests.objectives.mixtures import KEY, NODES, pairs, system_of

BETA = 0.01
MIXED = "language model, categorical, gaussian"
PAINTED = "language model, diffusion"

# Of which drawn parameters make the sums of policy and reference so large that their rounding shows.
INITIALISED = ("language model", "language model, flow", "two kinds of picture")


@functools.cache
def start(name):
    """As `mixtures.start`, for quick tests without compiling an initialisation."""
    if name in INITIALISED:
        return mixtures.start(name)
    system = system_of(name)
    params, reference = (drawn(system.init, seed) for seed in (3, 4))
    return system, params, reference, pairs(system, params)


@functools.cache
def compiled(name):
    """(policy, reference, batch) -> ((loss, metrics), gradients for policy and reference): compiled once a mixture."""
    objective = functools.partial(DirectObjective(BETA), system_of(name))
    step = jax.value_and_grad(lambda p, r, batch: objective(p, r, batch, KEY), argnums=(0, 1), has_aux=True)
    # As users compile: policy and reference are then the same sums to the bit, which not every flag promises.
    return jax.jit(step, compiler_options={"xla_cpu_use_fusion_emitters": True})


def traced(objective, system, params, reference, batch):
    """What a call refuses, it refuses when it is traced."""
    jax.eval_shape(lambda: objective(system, params, reference, batch, KEY))


@functools.cache
def ratios(name):
    """(policy, reference, side) -> each node's log-ratio and both models' log-probabilities, compiled."""
    system = system_of(name)

    def values(p, r, side):
        return log_ratio(system, p, r, side, KEY), *(system.log_prob(tree, side, KEY) for tree in (p, r))

    return jax.jit(values)


@pytest.mark.parametrize("name", NODES)
def test_step_zero_is_ln_2_for_every_mixture(name):
    """Policy and reference see the same noise: the margin is 0 and the loss ln 2, to float32."""
    system, params, _, batch = start(name)
    (loss, (terms, metrics)), _ = compiled(name)(params, params, batch)
    assert abs(loss - math.log(2)) < 1e-6
    assert terms.keys() == {node.name for node in system.nodes if not node.deterministic}
    assert max(map(abs, [*terms.values(), metrics["rewards/margins"]])) < 1e-6


@pytest.mark.parametrize("name", NODES)
def test_the_gradient_reaches_every_component_and_no_reference(name):
    _, params, reference, batch = start(name)
    _, (gradients, of_reference) = compiled(name)(params, reference, batch)
    for key, tree in gradients.items():
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) > 0, key
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_reference))


@pytest.mark.parametrize("name", NODES)
def test_swapping_winner_and_loser_turns_the_margin(name):
    """The two sides are drawn from the same noise: log sigmoid(m) - log sigmoid(-m) = m."""
    _, params, reference, batch = start(name)
    (loss, (_, metrics)), _ = compiled(name)(params, reference, batch)
    (turned, (_, turned_metrics)), _ = compiled(name)(params, reference, PairBatch(batch.rejected, batch.chosen))
    margin = metrics["rewards/margins"]
    np.testing.assert_allclose(turned_metrics["rewards/margins"], -margin, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned - loss, margin, rtol=1e-4, atol=1e-4)


def test_loss_and_metrics_by_hand_from_the_log_ratios_of_the_nodes():
    """NumPy on what `log_ratio` returns for each side; the components' own values are tested with the components."""
    _, params, reference, batch = start(MIXED)
    sides = [ratios(MIXED)(params, reference, side)[0] for side in batch[:2]]
    chosen, rejected = ({k: np.asarray(v, np.float64) for k, v in side.items()} for side in sides)
    (loss, (terms, metrics)), _ = compiled(MIXED)(params, reference, batch)
    margin = BETA * (sum(chosen.values()) - sum(rejected.values()))
    assert np.abs(margin).max() > 1e-3
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    expected = {
        "rewards/chosen": BETA * sum(chosen.values()).mean(),
        "rewards/rejected": BETA * sum(rejected.values()).mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
    }
    assert terms.keys() == {"text", "choice", "value"}
    for name, term in terms.items():
        expected[f"rewards/margins/{name}"] = BETA * (chosen[name] - rejected[name]).mean()
        assert term == metrics[f"rewards/margins/{name}"]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert chosen["length"].tolist() == chosen["number"].tolist() == [0.0] * 4


def test_a_nodes_weight_scales_its_log_ratio():
    """Weight 3 in the log-ratio; the log-probabilities that are logged stay in the node's own nats."""
    _, params, reference, batch = start(MIXED)
    ratio, policy, before = (tree["value"] for tree in ratios(MIXED)(params, reference, batch.chosen))
    np.testing.assert_allclose(ratio, 3 * (policy - before), rtol=1e-5)


def test_diffusion_errors_of_policy_and_reference_are_metrics():
    _, params, reference, batch = start(PAINTED)
    (_, (_, metrics)), _ = compiled(PAINTED)(params, reference, batch)
    _, *logps = zip(*(ratios(PAINTED)(params, reference, side) for side in batch[:2]), strict=True)
    for model, sides in zip(("policy", "reference"), logps, strict=True):
        # Constant weight 50,000 (arXiv 2311.12908): minus half of it, times the error, summed over two pictures.
        expected = np.mean([side["image"] for side in sides]) / (-25_000.0 * 2)
        np.testing.assert_allclose(metrics[f"mse/image/{model}"], expected, rtol=1e-4)
    rise = metrics["mse/image/policy"] - metrics["mse/image/reference"]
    np.testing.assert_allclose(metrics["drift/mse/image"], rise, atol=1e-6)
    assert "drift/kl/image" not in metrics


def test_sft_adds_the_winners_log_probability():
    system, params, reference, batch = start(PAINTED)
    (plain, _), _ = compiled(PAINTED)(params, reference, batch)
    anchored, _ = jax.jit(functools.partial(DirectObjective(BETA, sft=(("text", 0.3),)), system))(
        params, reference, batch, KEY
    )
    winner = ratios(PAINTED)(params, reference, batch.chosen)[1]["text"]
    np.testing.assert_allclose(anchored - plain, -0.3 * winner.mean(), rtol=1e-3)
    with pytest.raises(GraphError, match="sft names the node 'captions', which is not a trained node: image, text are"):
        traced(DirectObjective(0.1, sft=(("captions", 0.3),)), system, params, reference, batch)


def test_a_frozen_component_contributes_nothing_and_is_not_evaluated():
    system, params, reference, batch = start(PAINTED)
    only_text = {"text": reference["text"]}
    found = ratios(PAINTED)(params, reference, batch.chosen)[0]
    alone = jax.jit(lambda p, r, side: log_ratio(system, p, r, side, KEY))(params, only_text, batch.chosen)
    np.testing.assert_array_equal(alone["image"], np.zeros(4))
    np.testing.assert_allclose(alone["text"], found["text"], rtol=1e-6, atol=1e-6)
    (loss, (terms, metrics)), (gradient, _) = compiled(PAINTED)(params, only_text, batch)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["image"]))
    assert "rewards/margins/image" not in metrics
    assert terms.keys() == {"text"}
    assert np.isfinite(loss)
    with pytest.raises(GraphError, match="every component is frozen"):
        traced(DirectObjective(0.1), system, params, {}, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpo"}, "unknown loss 'dpo': did you mean 'ipo'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0\.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "does not use label_smoothing"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DirectObjective(**settings)
