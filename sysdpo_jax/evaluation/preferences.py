"""Figures of a system's runs, their standard errors, and 95% confidence intervals of means and of shares.

Runs of one prompt are alike, so errors are clustered: prompts are independent, runs of one prompt need not be.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

Grades = Float[np.ndarray, "*runs 3"]
Values = Float[np.ndarray, "runs"]
# The label of each run's cluster, an integer or a string.
Clusters = Shaped[np.ndarray, "labels"]
# The least and the greatest value that a run can have.
Bounds = tuple[float, float]
SHARE: Bounds = (0.0, 1.0)

Number = int | float

CONFIDENCE = 0.95
TAIL = (1 + CONFIDENCE) / 2
NORMAL = NormalDist().inv_cdf(TAIL)
# Below this number of prompts an interval, whose own width is then an estimate from few numbers, says little: by
# Student's t with 19 degrees of freedom it is 7% wider than with many prompts, with 4 it is 42% wider.
ENOUGH_PROMPTS = 20
# What rounding leaves of a standard error that is 0.
ROUNDING = 1e-12


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over runs, its standard error and its 95% confidence interval.

    Args:
        value: The mean.
        standard_error: Of it; None where it is not known.
        n: How many runs.
        interval: The 95% confidence interval; None where it is not known.
    """

    value: float
    standard_error: float | None
    n: int
    interval: Interval | None = None


def preference_score(grades: Grades) -> Float[np.ndarray, "*runs"]:
    """q = -(a_1 - a_3 + |a_2 - (a_1 + a_3) / 2|) of three attribute scores in the asked direction.

    arXiv 2502.17721, section 5: a wide range and even steps are good; the best of scores in [0, 1] is 1.

    Args:
        grades: a_1, a_2, a_3 of each run.

    Returns:
        q of each run.

    Raises:
        ValueError: For grades that are not finite.
    """
    first, second, third = np.moveaxis(_finite(grades), -1, 0)
    return np.asarray(-(first - third + np.abs(second - (first + third) / 2)))


def order_consistency(grades: Grades) -> Float[np.ndarray, "*runs"]:
    """Whether three attribute scores are in the asked order; the mean is the order-consistency ratio of arXiv
    2502.17721.

    Args:
        grades: a_1, a_2, a_3 of each run.

    Returns:
        1 where a_1 < a_2 < a_3, else 0.

    Raises:
        ValueError: As `preference_score`.
    """
    return np.asarray((np.diff(_finite(grades), axis=-1) > 0).all(axis=-1), np.float64)


def clustered_mean(values: Values, clusters: Clusters, bounds: Bounds | None = None) -> Estimate:
    """The mean, and its standard error robust to correlation inside clusters (Liang and Zeger 1986).

    SE^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2 over G clusters; with one run a cluster it is the usual
    s / sqrt(n).

    Args:
        values: of the runs.
        clusters: the prompt of each run.
        bounds: what the values lie between by their nature, (0.0, 1.0) for right and wrong: then the interval is
            Wilson's (`share_interval`), otherwise Student's (`mean_interval`).

    Returns:
        The mean with its error and 95% interval.

    Raises:
        ValueError: for no runs, a single cluster, or values that are not finite or outside the bounds.
    """
    values = _checked(values, clusters)
    _, index = np.unique(clusters, return_inverse=True)
    number = int(index.max()) + 1
    if number < 2:
        raise ValueError("a standard error needs at least two clusters (prompts)")
    mean = float(values.mean())
    sums = np.bincount(index, weights=values - mean, minlength=number)
    error = float(np.sqrt(number / (number - 1) * (sums**2).sum() / len(values) ** 2))
    if bounds is None:
        return Estimate(mean, error, len(values), mean_interval(mean, error, number))
    low, width = bounds[0], bounds[1] - bounds[0]
    if not (bounds[0] <= values.min() and values.max() <= bounds[1]):
        raise ValueError(f"values from {values.min():g} to {values.max():g} are not all within the bounds {bounds}")
    share, variance = (mean - low) / width, float(values.var()) / width**2
    ends = share_interval(share, error / width, variance, len(values), number)
    return Estimate(mean, error, len(values), Interval(low + width * ends.low, low + width * ends.high))


def paired_difference(first: Values, second: Values, clusters: Clusters, bounds: Bounds | None = None) -> Estimate:
    """The mean of first - second over runs that share prompt and noise.

    Args:
        first: A value of each run.
        second: Of the run that it is compared with.
        clusters: The prompt of each run.
        bounds: Of both, see `clustered_mean`.

    Returns:
        The mean difference with its error and interval.

    Raises:
        ValueError: As `clustered_mean`.
    """
    difference = _checked(first, clusters) - _checked(second, clusters)
    return clustered_mean(difference, clusters, bounds and (bounds[0] - bounds[1], bounds[1] - bounds[0]))


def win_rate(first: Values, second: Values, clusters: Clusters) -> Estimate:
    """Share of paired runs in which first > second; a tie counts half.

    Args:
        first: A score of each run.
        second: Of the run that it is compared with.
        clusters: The prompt of each run.

    Returns:
        The share with its error and Wilson's interval.

    Raises:
        ValueError: As `clustered_mean`.
    """
    difference = np.sign(_checked(first, clusters) - _checked(second, clusters))
    return clustered_mean((difference + 1) / 2, clusters, SHARE)


def mean_interval(mean: Number, standard_error: Number, clusters: int) -> Interval:
    """mean -+ t SE, by Student's t with clusters - 1 degrees of freedom: the error itself is of so many numbers.

    Args:
        mean: Of the values.
        standard_error: SE of it.
        clusters: The number of independent groups of runs, at least 2.

    Returns:
        The 95% interval.
    """
    reach = _student(clusters - 1) * standard_error
    return Interval(mean - reach, mean + reach)


def _student(freedom: int) -> float:
    """Student's t that a share `TAIL` lies below."""
    # Imported late: it takes half a second, which a run without an evaluation does not need.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, TAIL))


def wilson_interval(share: Number, number: Number, quantile: Number = NORMAL) -> Interval:
    """Wilson's score interval of a share p of n independent trials: never of width 0, and always inside [0, 1].

    (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n). E. B. Wilson, Probable inference, the law of
    succession, and statistical inference, Journal of the American Statistical Association 22 (1927).

    Args:
        share: p, in [0, 1].
        number: n, above 0; an effective number need not be whole.
        quantile: z, standard errors on either side.

    Returns:
        The interval.
    """
    ratio = quantile**2 / number
    middle = (share + ratio / 2) / (1 + ratio)
    reach = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    # At 0 and at 1 an end is the share itself, but for rounding.
    low = 0.0 if share == 0 else middle - reach
    return Interval(low, 1.0 if share == 1 else middle + reach)


def share_interval(share: Number, standard_error: Number, variance: Number, number: int, clusters: int) -> Interval:
    """Wilson's interval of a share of runs that are alike inside clusters, by an effective number of runs.

    n_eff = p (1 - p) / SE^2, and t with clusters - 1 degrees of freedom in place of z: E. L. Korn and B. I. Graubard,
    Confidence intervals for proportions with small expected number of positive counts estimated from survey data,
    Survey Methodology 24 (1998). As there, runs of a cluster count as no less alike than those of several. Where SE is
    0 (all runs won, or all clusters alike) nothing tells how alike the runs of a cluster are: n_eff is then the number
    of clusters, which is right if they are copies of each other. With one run a cluster, each a success or not, nothing
    is clustered, and it is Wilson's interval of as many trials.

    Args:
        share: p, the mean of values in [0, 1].
        standard_error: SE of it, as of `clustered_mean`.
        variance: of the runs' values, p (1 - p) where each is 0 or 1, less with ties that count half.
        number: of runs.
        clusters: the number of independent groups of runs, at least 2.

    Returns:
        The 95% interval, inside [0, 1].
    """
    binomial = share * (1 - share)
    alone = number == clusters and math.isclose(variance, binomial, abs_tol=ROUNDING)
    if alone or standard_error < ROUNDING:
        return wilson_interval(share, clusters)
    effective = binomial / max(standard_error**2, variance / number)
    return wilson_interval(share, effective, _student(clusters - 1))


def too_few(prompts: int) -> str | None:
    """What is to be said of an interval from few prompts.

    Args:
        prompts: How many there are.

    Returns:
        A sentence; None where they are enough.
    """
    if prompts >= ENOUGH_PROMPTS:
        return None
    if prompts == 1:
        return "too few prompts (n = 1): figures of one prompt have no interval"
    return f"too few prompts (n = {prompts}, fewer than {ENOUGH_PROMPTS}): the interval says little"


def interval_figures(name: str, estimate: Estimate) -> dict[str, float]:
    """Figures for `training.Evaluation` to log, which the report draws as a curve with a band.

    Args:
        name: Of the figure.
        estimate: With an interval.

    Returns:
        {name: mean, <name>/low and <name>/high: the ends of its 95% confidence interval}.

    Raises:
        ValueError: For an estimate without an interval.
    """
    if estimate.interval is None:
        raise ValueError(f"the estimate of {name!r} has no interval: make it by clustered_mean, or log its value alone")
    low, high = estimate.interval
    return {name: estimate.value, f"{name}/low": low, f"{name}/high": high}


def _finite(grades: Grades) -> Grades:
    broken = np.argwhere(~np.isfinite(grades))
    if len(broken):
        raise ValueError(f"the grade at index {tuple(broken[0].tolist())} is not finite")
    return grades


def _checked(values: Any, clusters: Clusters) -> Values:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"values of shape {values.shape} and {len(clusters)} clusters: one of each for every run")
    if not np.isfinite(values).all():
        raise ValueError(f"the value of run {int(np.argmin(np.isfinite(values)))} is not finite")
    return values
