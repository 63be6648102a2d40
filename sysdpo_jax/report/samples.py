"""Whole runs of one prompt side by side: every value of the graph in its order, with the runs' scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sysdpo_jax.report.markup import Markup, element, join
from sysdpo_jax.report.pictures import html_picture


@dataclass(frozen=True, eq=False)
class ShownRun:
    """A run. method: what made it. values: of all nodes, in order; arrays are pictures. score: a text."""

    method: str
    values: Mapping[str, Any]
    score: str


@dataclass(frozen=True, eq=False)
class ComparedRuns:
    """Runs of several methods on the same inputs and seed. Raises ValueError where they are not of the same nodes."""

    title: str
    inputs: Mapping[str, Any]
    runs: tuple[ShownRun, ...]

    def __post_init__(self) -> None:
        for run in self.runs[1:]:
            if list(run.values) != list(self.runs[0].values):
                raise ValueError(f"runs {self.title!r}: {run.method!r} has other nodes than {self.runs[0].method!r}")


def html_runs(compared: ComparedRuns) -> Markup:
    """A <table> with a column a run: the inputs over all of them, then the scores, then a row for each node."""
    runs, number = compared.runs, len(compared.runs)
    rows = [
        *(_rows(name, [value], number) for name, value in compared.inputs.items()),
        _rows("score", [run.score for run in runs], number),
        *(_rows(name, [run.values[name] for run in runs], number) for name in runs[0].values),
    ]
    return element(
        "table",
        element("caption", compared.title),
        element("thead", element("tr", *(element("th", run.method, scope="col") for run in runs))),
        element("tbody", join(*rows)),
        class_="runs",
    )


def _rows(name: str, values: list[Any], columns: int) -> Markup:
    """A name across the table, and below it the values; one value is across too."""
    across = {"colspan": columns} if len(values) == 1 else {}
    head = element("tr", element("th", name, colspan=columns, scope="rowgroup"))
    return join(head, element("tr", *(element("td", _html_value(value, name), **across) for value in values)))


def _html_value(value: Any, name: str) -> Markup:
    """A picture, the items of a list that are more than numbers, the fields of a mapping, or a text."""
    if isinstance(value, np.ndarray) and value.ndim == 3:
        return html_picture(value, name)
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
        return element("ol", *(element("li", _html_value(item, name)) for item in value))
    if isinstance(value, Mapping):
        fields = ((element("dt", str(key)), element("dd", _html_value(item, name))) for key, item in value.items())
        return element("dl", *(part for pair in fields for part in pair))
    text = str(value)
    return join(text) if text.strip() else element("span", "(empty)" if not text else "(white space)", class_="empty")
