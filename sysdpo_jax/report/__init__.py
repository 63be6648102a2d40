"""What people read of a run: tables, charts, samples, the page that holds them, and a model's card."""

from sysdpo_jax.report.curves import Curve, Figure, learning_figures, run_figures, run_warnings, split_figure
from sysdpo_jax.report.page import Report, write_report
from sysdpo_jax.report.pictures import ImageRow, ImageSequence, image_grid, to_image
from sysdpo_jax.report.tables import (
    Column,
    ComparedRuns,
    Row,
    ShownRun,
    Table,
    TextTable,
    console_table,
    markdown_table,
)

__all__ = [
    "Column",
    "ComparedRuns",
    "Curve",
    "Figure",
    "ImageRow",
    "ImageSequence",
    "Report",
    "Row",
    "ShownRun",
    "Table",
    "TextTable",
    "console_table",
    "image_grid",
    "learning_figures",
    "markdown_table",
    "run_figures",
    "run_warnings",
    "split_figure",
    "to_image",
    "write_report",
]
