"""Categorical and Gaussian against closed forms, and their samples against their probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import Categorical, Gaussian, RecordError

KEY = jax.random.key(1)


def test_categorical_is_a_normalised_table():
    table = Categorical(4, (3,))
    params = table.init(KEY)
    features = table.prepare([0, 1, 2, 3], {"y": [1, 1, 1, 1]})
    logits = [float(v) for v in params["logits"][1]]
    normaliser = math.log(sum(math.exp(v) for v in logits))
    np.testing.assert_allclose(table.log_prob(params, features, KEY), [v - normaliser for v in logits], atol=1e-6)


def test_categorical_samples_follow_the_table():
    """4000 draws: the share of each value lies within 4 standard errors of its probability."""
    table = Categorical(3, (2,))
    params = table.init(KEY)
    draws = np.array(table.sample(params, {"y": [1] * 4000}, KEY))
    weights = np.exp(np.asarray(params["logits"][1], np.float64))
    p = weights / weights.sum()
    share = np.bincount(draws, minlength=3) / 4000
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 4000)).all()


@pytest.mark.parametrize(
    ("values", "parents", "message"),
    [
        ([0.5], {"y": [0]}, "must be an integer"),
        ([5], {"y": [0]}, r"its own value is 5 in row 0, outside 0\.\.3"),
        ([0], {"y": [9]}, "y is 9 in row 0"),
        ([0], {"y": [0], "x": [0]}, "one size for each parent"),
    ],
)
def test_categorical_refuses_other_values(values, parents, message):
    with pytest.raises(RecordError, match=message):
        Categorical(4, (3,)).prepare(values, parents)


@pytest.mark.parametrize("parent", [9, -1, 1.5])
def test_categorical_samples_from_no_row_that_is_not_there(parent):
    node = Categorical(4, (3,))
    with pytest.raises(RecordError, match=f"y .*{parent}"):
        node.sample(node.init(KEY), {"y": [parent]}, KEY)


def test_gaussian_is_the_normal_density():
    node = Gaussian(size=2, parent_size=1, scale=0.5)
    params = {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.5, 0.0])}
    features = node.prepare([[1.0, 1.0]], {"x": [3.0]})
    z = [(1.0 - 6.5) / 0.5, (1.0 + 3.0) / 0.5]
    expected = sum(-0.5 * v * v - 0.5 * math.log(2 * math.pi) - math.log(0.5) for v in z)
    np.testing.assert_allclose(node.log_prob(params, features, KEY), [expected], rtol=1e-6)


def test_gaussian_samples_have_its_moments():
    """4000 draws: mean and standard deviation within 5 standard errors."""
    node = Gaussian(size=1, parent_size=1, scale=0.5)
    params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])}
    draws = np.array(node.sample(params, {"x": [3.0] * 4000}, KEY))
    assert abs(draws.mean() - 7.0) < 5 * 0.5 / math.sqrt(4000)
    assert abs(draws.std() - 0.5) < 5 * 0.5 / math.sqrt(8000)


def test_gaussian_refuses_other_sizes_and_nan():
    with pytest.raises(RecordError, match="its own value has 1 numbers a row, expected 2"):
        Gaussian(2, 1).prepare([1.0], {"x": [0.0]})
    with pytest.raises(RecordError, match="not finite in row 1"):
        Gaussian(1, 1).prepare([1.0, float("nan")], {"x": [0.0, 0.0]})
