"""SysDPO-Direct on systems of every kind of component: what must hold whatever the models are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import DirectObjective, GraphError, PairBatch, log_ratio
from tests.objectives.mixtures import KEY, NODES, start


@pytest.mark.parametrize("name", NODES)
def test_step_zero_is_ln_2_for_every_mixture(name):
    """Policy and reference see the same noise, so the margin is 0 exactly and the loss ln 2 to float32."""
    system, params, _, batch = start(name)
    objective = jax.jit(DirectObjective(0.1), static_argnums=0)
    loss, metrics = objective(system, params, params, batch, KEY)
    assert abs(loss - math.log(2)) < 1e-6
    step = jax.jit(lambda p, r: jax.value_and_grad(lambda q: DirectObjective(0.1)(system, q, r, batch, KEY)[0])(p))
    assert abs(step(params, params)[0] - math.log(2)) < 1e-6
    margins = {name: float(v) for name, v in metrics.items() if name.startswith("rewards/margins")}
    assert set(margins.values()) == {0.0}
    trained = {node.name for node in system.nodes if not node.deterministic}
    assert {f"rewards/margins/{name}" for name in trained} <= set(margins)


@pytest.mark.parametrize("name", NODES)
def test_the_gradient_reaches_every_component(name):
    system, params, reference, batch = start(name)
    gradients = jax.jit(jax.grad(lambda p: DirectObjective(0.1)(system, p, reference, batch, KEY)[0]))(params)
    for key, tree in gradients.items():
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) > 0, key


@pytest.mark.parametrize("name", NODES)
def test_swapping_winner_and_loser_turns_the_margin(name):
    """The two sides are drawn from the same noise: log sigmoid(m) - log sigmoid(-m) = m."""
    system, params, reference, batch = start(name)
    objective = jax.jit(DirectObjective(0.01), static_argnums=0)
    loss, metrics = objective(system, params, reference, batch, KEY)
    turned, turned_metrics = objective(system, params, reference, PairBatch(batch.rejected, batch.chosen), KEY)
    margin = metrics["rewards/margins"]
    np.testing.assert_allclose(turned_metrics["rewards/margins"], -margin, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned - loss, margin, rtol=1e-4, atol=1e-4)


MIXED = "language model, categorical, gaussian"


def test_loss_and_metrics_by_hand_from_the_log_ratios_of_the_nodes():
    """NumPy on what `log_ratio` returns for each side; the components' own values are tested with the components."""
    system, params, reference, batch = start(MIXED)
    sides = [log_ratio(system, params, reference, side, KEY) for side in batch[:2]]
    chosen, rejected = ({k: np.asarray(v, np.float64) for k, v in side.items()} for side in sides)
    loss, metrics = DirectObjective(0.3)(system, params, reference, batch, KEY)
    margin = 0.3 * (sum(chosen.values()) - sum(rejected.values()))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    expected = {
        "rewards/chosen": 0.3 * sum(chosen.values()).mean(),
        "rewards/rejected": 0.3 * sum(rejected.values()).mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
    } | {f"rewards/margins/{k}": 0.3 * (chosen[k] - rejected[k]).mean() for k in ("text", "choice", "value")}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert chosen["length"].tolist() == chosen["number"].tolist() == [0.0] * 4


def test_a_nodes_weight_scales_its_log_ratio():
    """Weight 3 in the log-ratio; the log-probabilities that are logged stay in the node's own nats."""
    system, params, reference, batch = start(MIXED)
    ratio = log_ratio(system, params, reference, batch.chosen, KEY)["value"]
    parts = [system.log_prob(p, batch.chosen, KEY)["value"] for p in (params, reference)]
    np.testing.assert_allclose(ratio, 3 * (parts[0] - parts[1]), rtol=1e-5)


def test_diffusion_errors_of_policy_and_reference_are_metrics():
    system, params, reference, batch = start("language model, diffusion")
    _, metrics = DirectObjective(0.1)(system, params, reference, batch, KEY)
    for model, p in (("policy", params), ("reference", reference)):
        logps = [system.log_prob(p, side, KEY)["image"] for side in batch[:2]]
        # Constant weight 50,000 (arXiv 2311.12908): minus half of it, times the error, summed over two pictures.
        expected = np.mean(logps) / (-25_000.0 * 2)
        np.testing.assert_allclose(metrics[f"mse/image/{model}"], expected, rtol=1e-4)


def test_sft_adds_the_winners_log_probability():
    system, params, reference, batch = start("language model, diffusion")
    plain, _ = DirectObjective(0.1)(system, params, reference, batch, KEY)
    anchored, _ = DirectObjective(0.1, sft=(("text", 0.3),))(system, params, reference, batch, KEY)
    winner = system.log_prob(params, batch.chosen, KEY)["text"]
    np.testing.assert_allclose(anchored - plain, -0.3 * winner.mean(), rtol=1e-3)
    with pytest.raises(GraphError, match="sft names the node 'captions', which is not a trained node: image, text are"):
        DirectObjective(0.1, sft=(("captions", 0.3),))(system, params, reference, batch, KEY)


def test_a_frozen_component_contributes_nothing_and_is_not_evaluated():
    system, params, reference, batch = start("language model, diffusion")
    only_text = {"text": reference["text"]}
    ratios = log_ratio(system, params, only_text, batch.chosen, KEY)
    whole = log_ratio(system, params, reference, batch.chosen, KEY)
    np.testing.assert_array_equal(ratios["image"], np.zeros(4))
    np.testing.assert_array_equal(ratios["text"], whole["text"])
    loss, metrics = DirectObjective(0.1)(system, params, only_text, batch, KEY)
    gradient = jax.grad(lambda p: DirectObjective(0.1)(system, p, only_text, batch, KEY)[0])(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["image"]))
    assert "rewards/margins/image" not in metrics
    assert np.isfinite(loss)
    with pytest.raises(GraphError, match="every component is frozen"):
        DirectObjective(0.1)(system, params, {}, batch, KEY)


def test_no_gradient_reaches_the_reference():
    system, params, reference, batch = start("language model, flow")
    gradient = jax.grad(lambda r: DirectObjective(0.1)(system, params, r, batch, KEY)[0])(reference)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpo"}, "unknown loss 'dpo': choose one of sigmoid"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0\.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "does not use label_smoothing"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DirectObjective(**settings)
