"""Preference figures on numbers worked by hand; standard errors against closed forms and a bootstrap."""

import numpy as np
import pytest

from sysdpo_jax.evaluation import (
    Estimate,
    clustered_mean,
    interval_figures,
    order_consistency,
    paired_difference,
    preference_score,
    win_rate,
)


@pytest.mark.parametrize(
    ("grades", "score", "ordered"),
    [
        ([0.0, 0.5, 1.0], 1.0, 1.0),
        ([1.0, 0.5, 0.0], -1.0, 0.0),
        ([0.4, 0.4, 0.4], 0.0, 0.0),
        ([0.0, 1.0, 1.0], 0.5, 0.0),
        ([0.25, 0.125, 0.75], 0.125, 0.0),
        ([-1.0, -0.75, -0.5], 0.5, 1.0),
    ],
)
def test_score_and_order_of_one_run(grades, score, ordered):
    """All numbers are sums of powers of two, so the results are exact."""
    assert preference_score(np.array(grades)) == score
    assert order_consistency(np.array(grades)) == ordered


def test_runs_keep_their_axes():
    grades = np.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(preference_score(grades), np.full((2, 4), 2.0))
    np.testing.assert_array_equal(order_consistency(grades), np.ones((2, 4)))


@pytest.mark.parametrize("figure", [preference_score, order_consistency])
def test_a_grade_that_is_not_finite_is_named(figure):
    grades = np.zeros((3, 3))
    grades[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"grade at index \(1, 2\)"):
        figure(grades)


def test_one_run_a_cluster_is_the_classic_standard_error():
    values = np.random.default_rng(0).normal(size=31)
    estimate = clustered_mean(values, np.arange(31))
    assert estimate.n == 31
    np.testing.assert_allclose(estimate.value, np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(estimate.standard_error, np.std(values, ddof=1) / np.sqrt(31), rtol=1e-12)


def test_copies_inside_a_cluster_add_no_information():
    means = np.random.default_rng(1).normal(size=12)
    names = np.array([f"prompt {k}" for k in range(12)])
    estimate = clustered_mean(np.repeat(means, 50), np.repeat(names, 50))
    np.testing.assert_allclose(estimate.standard_error, np.std(means, ddof=1) / np.sqrt(12), rtol=1e-12)


def test_standard_error_of_unequal_clusters_is_the_bootstrap_s():
    """Whole clusters drawn 4000 times: its own error is 1.1%, G / (G - 1) makes 0.8%, so 5% allows for both."""
    draw = np.random.default_rng(2)
    groups = [draw.normal(draw.normal(), 0.5, size=draw.integers(3, 9)) for _ in range(60)]
    clusters = np.repeat(np.arange(60), [len(group) for group in groups])
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    picks = draw.integers(60, size=(4000, 60))
    spread = np.std(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1))
    estimate = clustered_mean(np.concatenate(groups), clusters)
    np.testing.assert_allclose(estimate.standard_error, spread, rtol=0.05)
    assert estimate.standard_error > 1.5 * np.std(np.concatenate(groups)) / np.sqrt(len(clusters))


def test_paired_difference_is_free_of_what_both_runs_share():
    draw = np.random.default_rng(3)
    shared, clusters = draw.normal(size=40), np.arange(40) % 10
    estimate = paired_difference(shared + 0.25, shared, clusters)
    np.testing.assert_allclose([estimate.value, estimate.standard_error], [0.25, 0.0], atol=1e-12)


def test_figures_are_the_mean_and_the_ends_of_its_interval():
    estimate = clustered_mean(np.array([1.0, 2.0, 4.0]), np.arange(3))
    low, high = estimate.interval
    assert interval_figures("a", estimate) == {"a": estimate.value, "a/low": low, "a/high": high}
    with pytest.raises(ValueError, match="the estimate of 'a' has no interval"):
        interval_figures("a", Estimate(0.5, 0.1, 3))


def test_values_outside_of_their_bounds_are_refused():
    with pytest.raises(ValueError, match=r"values from 0 to 2 are not all within the bounds \(0.0, 1.0\)"):
        clustered_mean(np.array([0.0, 2.0]), np.arange(2), (0.0, 1.0))


def test_win_rate_counts_a_tie_as_half():
    first, second = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])
    # Wins 1, 1/2, 0, 1: the squared deviations from 5/8 sum to 11/16, divided by 4 * 3.
    expected = Estimate(0.625, np.sqrt(11 / 16 / 12), 4)
    estimate = win_rate(first, second, np.arange(4))
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-15)
    np.testing.assert_allclose(estimate.standard_error, expected.standard_error, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], r"values of shape \(0,\)"),
        ([1.0, 2.0], [0], "1 clusters"),
        ([1.0, np.nan], [0, 1], "run 1 is not finite"),
        ([1.0, 2.0], ["a", "a"], "at least two clusters"),
    ],
)
def test_runs_without_an_estimate_are_refused(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        clustered_mean(np.array(values), np.array(clusters))
