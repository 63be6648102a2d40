"""Intervals against scipy's, against closed forms, and by how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, ttest_1samp

from sysdpo_jax.evaluation import (
    clustered_mean,
    mean_interval,
    paired_difference,
    share_interval,
    too_few,
    wilson_interval,
    win_rate,
)

SHARE = (0.0, 1.0)


@pytest.mark.parametrize(("wins", "number"), [(0, 1), (0, 20), (20, 20), (1, 20), (7, 11), (499, 1000), (300, 300)])
def test_wilson_of_trials_is_scipy_s(wins, number):
    """And that of runs of as many prompts, each won or lost; at 0 and 100% too it has a width, and an exact end."""
    known = binomtest(wins, number).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(wins / number, number), (known.low, known.high), rtol=1e-12, atol=1e-15)
    if number > 1:
        values = (np.arange(number) < wins).astype(float)
        found = clustered_mean(values, np.arange(number), SHARE).interval
        np.testing.assert_allclose(found, (known.low, known.high), rtol=1e-12, atol=1e-15)
        assert found.high - found.low > 0.002
        assert wins > 0 or found.low == 0
        assert wins < number or found.high == 1


@pytest.mark.parametrize("number", [20, 100])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.95])
def test_wilson_holds_the_truth_19_times_in_20(number, share):
    """Exactly, over all that can happen; the normal interval has 64% at n = 20 and 5%."""
    wins = np.arange(number + 1)
    ends = np.array([wilson_interval(k / number, number) for k in wins])
    held = binom.pmf(wins, number, share)[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum()
    assert 0.92 <= held <= 0.985


def alike(rng, share, likeness, prompts):
    """The shares that win of each prompt's runs; a beta distribution has the likeness inside a prompt."""
    scale = (1 - likeness) / likeness
    return rng.beta(share * scale, (1 - share) * scale, prompts)


@pytest.mark.parametrize(("share", "prompts"), [(0.5, 20), (0.8, 20), (0.95, 20), (0.5, 6)])
def test_runs_of_a_prompt_that_are_alike_count_for_less(share, prompts):
    """1000 evaluations of 4 runs a prompt: 0.92 is four standard errors below 0.95. As if independent: 80% or less."""
    rng, held, naive = np.random.default_rng(0), [], []
    for _ in range(1000):
        wins = rng.binomial(4, alike(rng, share, 0.6, prompts))
        values = (np.arange(4) < wins[:, None]).astype(float).ravel()
        low, high = clustered_mean(values, np.repeat(np.arange(prompts), 4), SHARE).interval
        held.append(low <= share <= high)
        low, high = wilson_interval(values.mean(), len(values))
        naive.append(low <= share <= high)
    assert np.mean(held) > 0.92
    assert np.mean(naive) < 0.85


def test_copies_of_a_run_add_nothing():
    """Wilson's interval of the prompts, by Student's t, once the copies' likeness is seen."""
    won = (np.arange(30) < 21).astype(float)
    estimate = clustered_mean(np.repeat(won, 8), np.repeat(np.arange(30), 8), SHARE)
    # n_eff = p (1 - p) / SE^2 with SE^2 = p (1 - p) / 29.
    np.testing.assert_allclose(estimate.interval, wilson_interval(0.7, 29, 2.045229642), rtol=1e-8)


def test_independent_runs_of_a_prompt_count_in_full_and_never_for_more():
    """Half of every prompt's runs won, which is more alike between prompts than chance would make it."""
    values = np.tile([1.0, 0.0, 1.0, 0.0, 0.0], 24)
    values[8] = 1.0
    found = clustered_mean(values, np.repeat(np.arange(24), 5), SHARE).interval
    np.testing.assert_allclose(found, wilson_interval(values.mean(), 120, 2.0686576104), rtol=1e-8)


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5, 1.0])
def test_without_any_difference_between_prompts_each_counts_once(share):
    """All won, all lost, all tied, or a third of each prompt: a sample of runs cannot tell how alike they are."""
    values = np.tile([share, share, share] if share in (0.0, 0.5, 1.0) else [1.0, 0.0, 0.0], 10)
    found = clustered_mean(values, np.repeat(np.arange(10), 3), SHARE).interval
    np.testing.assert_allclose(found, wilson_interval(share, 10), rtol=1e-12)
    assert found.high - found.low > 0.27


def test_ties_make_a_win_rate_more_certain_than_wins_and_losses():
    clusters, zeros = np.arange(100), np.zeros(100)
    mixed = win_rate(np.where(clusters < 60, 1.0, -1.0), zeros, clusters)
    ties = win_rate(np.where(clusters < 20, 1.0, 0.0), zeros, clusters)
    assert mixed.value == ties.value == 0.6
    width = lambda estimate: estimate.interval.high - estimate.interval.low  # noqa: E731
    # A fifth of the runs has 1, four fifths 1/2, so that the variance is 0.04, and not 0.24.
    assert width(ties) / width(mixed) == pytest.approx((0.04 / 0.24) ** 0.5, rel=0.05)
    assert ties.interval.low > 0.5


def test_a_win_rate_of_100_percent_is_not_certain():
    found = win_rate(np.ones(12), np.zeros(12), np.arange(12) // 3)
    assert (found.value, found.standard_error) == (1.0, 0.0)
    known = binomtest(4, 4).proportion_ci(method="wilson")
    np.testing.assert_allclose(found.interval, (known.low, 1.0), rtol=1e-12)


def test_the_difference_of_right_and_wrong_is_not_certain_either():
    """All wrong before, all right after: 1, of which the win rate's interval, stretched to [-1, 1], is the interval."""
    ones, zeros, clusters = np.ones(10), np.zeros(10), np.arange(10)
    found = paired_difference(ones, zeros, clusters, SHARE)
    assert found.value == 1
    low, high = win_rate(ones, zeros, clusters).interval
    np.testing.assert_allclose(found.interval, (2 * low - 1, 2 * high - 1), rtol=1e-12)
    assert found.interval.low < 0.5


def test_a_mean_of_few_prompts_is_as_uncertain_as_student_says():
    values = np.random.default_rng(0).normal(size=5)
    known = ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = clustered_mean(values, np.arange(5)).interval
    np.testing.assert_allclose(found, (known.low, known.high), rtol=1e-12)
    # 12.706 standard errors with one degree of freedom, 1.96 with many.
    np.testing.assert_allclose(mean_interval(0.0, 1.0, 2), (-12.7062047, 12.7062047), rtol=1e-8)
    np.testing.assert_allclose(mean_interval(1.0, 1.0, 10**6), (1 - 1.959966, 1 + 1.959966), rtol=1e-6)


def test_an_interval_never_leaves_the_bounds_and_holds_its_share():
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompts, samples = rng.integers(2, 30), rng.integers(1, 6)
        values = rng.choice([0.0, 0.5, 1.0], size=prompts * samples, p=rng.dirichlet([0.3, 0.3, 0.3]))
        estimate = clustered_mean(values, np.repeat(np.arange(prompts), samples), SHARE)
        low, high = estimate.interval
        assert 0 <= low <= estimate.value <= high <= 1
        assert low < high


def test_too_few_prompts_are_said_to_be_too_few():
    assert too_few(20) is None
    assert too_few(19) == "too few prompts (n = 19, fewer than 20): the interval says little"
    assert "no interval" in too_few(1)
    # The number is where Student's t is within 7% of the normal quantile.
    assert mean_interval(0, 1, 20).high / mean_interval(0, 1, 10**6).high < 1.07 < mean_interval(0, 1, 19).high / 1.96
    assert share_interval(0.5, 0.0, 0.25, 6, 6) == wilson_interval(0.5, 6)
