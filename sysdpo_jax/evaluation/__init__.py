"""Measuring what systems produce: scorers, preference figures and their intervals, tables, samples and the report."""

from sysdpo_jax.evaluation.chart import Curve, Figure
from sysdpo_jax.evaluation.intervals import Interval, mean_interval, share_interval, too_few, wilson_interval
from sysdpo_jax.evaluation.learning import learning_figures, run_figures, run_warnings, split_figure
from sysdpo_jax.evaluation.pictures import ImageRow, ImageSequence, image_grid
from sysdpo_jax.evaluation.png import write_png
from sysdpo_jax.evaluation.preferences import (
    Estimate,
    clustered_mean,
    interval_figures,
    order_consistency,
    paired_difference,
    preference_score,
    win_rate,
)
from sysdpo_jax.evaluation.report import Report, write_report
from sysdpo_jax.evaluation.samples import ComparedRuns, ShownRun
from sysdpo_jax.evaluation.scorers import CalibratedScorer, brightness, foreground, height, redness, size
from sysdpo_jax.evaluation.tables import Column, Ranged, Row, Table, console_table, markdown_table
from sysdpo_jax.evaluation.texts import TextTable

__all__ = [
    "CalibratedScorer",
    "Column",
    "ComparedRuns",
    "Curve",
    "Estimate",
    "Figure",
    "ImageRow",
    "ImageSequence",
    "Interval",
    "Ranged",
    "Report",
    "Row",
    "ShownRun",
    "Table",
    "TextTable",
    "brightness",
    "clustered_mean",
    "console_table",
    "foreground",
    "height",
    "image_grid",
    "interval_figures",
    "learning_figures",
    "markdown_table",
    "mean_interval",
    "order_consistency",
    "paired_difference",
    "preference_score",
    "redness",
    "run_figures",
    "run_warnings",
    "share_interval",
    "size",
    "split_figure",
    "too_few",
    "wilson_interval",
    "win_rate",
    "write_png",
    "write_report",
]
