"""Measuring what systems produce: scorers, judges, preference figures and their intervals."""

from sysdpo_jax.evaluation.preferences import (
    Estimate,
    Interval,
    clustered_mean,
    interval_figures,
    mean_interval,
    order_consistency,
    paired_difference,
    preference_score,
    share_interval,
    too_few,
    wilson_interval,
    win_rate,
)
from sysdpo_jax.evaluation.scorers import CalibratedScorer, brightness, foreground, height, redness, size

__all__ = [
    "CalibratedScorer",
    "Estimate",
    "Interval",
    "brightness",
    "clustered_mean",
    "foreground",
    "height",
    "interval_figures",
    "mean_interval",
    "order_consistency",
    "paired_difference",
    "preference_score",
    "redness",
    "share_interval",
    "size",
    "too_few",
    "wilson_interval",
    "win_rate",
]
