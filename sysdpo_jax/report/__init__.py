"""What people read of a run: tables, charts, samples, and the page that holds them."""

from sysdpo_jax.report.chart import Curve, Figure
from sysdpo_jax.report.learning import learning_figures, run_figures, run_warnings, split_figure
from sysdpo_jax.report.page import Report, write_report
from sysdpo_jax.report.pictures import ImageRow, ImageSequence, image_grid
from sysdpo_jax.report.png import write_png
from sysdpo_jax.report.samples import ComparedRuns, ShownRun
from sysdpo_jax.report.tables import Column, Ranged, Row, Table, console_table, markdown_table
from sysdpo_jax.report.texts import TextTable

__all__ = [
    "Column",
    "ComparedRuns",
    "Curve",
    "Figure",
    "ImageRow",
    "ImageSequence",
    "Ranged",
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
    "write_png",
    "write_report",
]
