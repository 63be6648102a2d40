"""95% confidence intervals of means and of shares, from a standard error that knows of clusters."""

import math
from statistics import NormalDist
from typing import NamedTuple

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
    # Imported late: it takes half a second, and who does not evaluate needs it not.
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
