"""A report of an experiment as one HTML file that needs no other: tables, curves, pictures and the graph."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import write_whole
from sysdpo_jax.report.curves import Figure
from sysdpo_jax.report.diagram import diagram
from sysdpo_jax.report.pictures import ImageRow, picture
from sysdpo_jax.report.tables import ComparedRuns, Table, TextTable


@dataclass(frozen=True)
class Report:
    """What the page shows; parts that are empty are left out.

    Args:
        title: Of the page.
        description: Paragraphs, separated by empty lines.
        tables: Of figures.
        figures: Of curves.
        images: Pictures of several methods beside each other.
        system: Whose graph is drawn.
        configuration: May be nested.
        made_by: The machine, the date, the command line and the like.
        texts: Tables of text.
        warnings: Texts, such as `run_warnings` of a run.
        headline: The result, a sentence each, on top of the page.
        runs: Whole runs of several methods.
    """

    title: str
    description: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    images: tuple[ImageRow, ...] = ()
    system: CompoundSystem | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[TextTable, ...] = ()
    warnings: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    runs: tuple[ComparedRuns, ...] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write the page; a reader never finds half of one.

    Args:
        path: Of the file.
        report: What it shows.

    Raises:
        ValueError: For pictures that are not finite.
    """
    from sysdpo_jax.report import charts

    parts = {"chart_svg": charts.chart_svg, "colour_classes": charts.colour_classes, "diagram": diagram}
    parts |= {"dotted": _dotted, "is_list": _is_list, "picture": picture}
    parts |= {"is_picture": lambda value: isinstance(value, np.ndarray) and value.ndim == 3}
    write_whole(Path(path), render("page.html.jinja", report=report, **parts))


def _is_list(value: Any) -> bool:
    """A list of more than numbers, which are shown in one line."""
    return isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def render(template: str, **values: Any) -> str:
    """The template of this name, filled in. A value that it lacks is an error; half of a character is shown escaped."""
    return ENVIRONMENT.get_template(template).render(values).encode("utf-8", "backslashreplace").decode("utf-8")


def code(text: str) -> str:
    """A text as code in a line of Markdown, also in a cell of a table, whatever it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line or not line else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """A text as a block of code in Markdown, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# Templates of pages escape whatever is not markup already, those of Markdown say how.
ENVIRONMENT = Environment(
    loader=PackageLoader("sysdpo_jax.report", ""),
    autoescape=lambda name: not (name or "").endswith(".md.jinja"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {"code": code, "fenced": fenced}
