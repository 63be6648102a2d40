"""A table of methods and their figures, for a page, a README and a terminal."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sysdpo_jax.evaluation.intervals import Interval
from sysdpo_jax.evaluation.preferences import Estimate
from sysdpo_jax.report.markup import Markup, element, join

ABSENT = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Ranged:
    """A figure of n runs, shown with its confidence interval instead of its standard error; None: it has none."""

    value: float
    interval: Interval | None
    n: int


Value = Estimate | Ranged | float | int | None


@dataclass(frozen=True)
class Column:
    """A figure. digits: after the point; percent: shares in [0, 1], shown times 100; best: which value is marked."""

    name: str
    digits: int = 3
    percent: bool = False
    best: Literal["max", "min"] | None = "max"

    @property
    def header(self) -> str:
        return f"{self.name} (%)" if self.percent else self.name


@dataclass(frozen=True)
class Row:
    """A method and one value for each column: an estimate, a plain number, or None for none."""

    name: str
    values: tuple[Value, ...]

    @property
    def runs(self) -> str:
        """The number of runs behind the row's estimates; several, joined by commas, where they differ."""
        numbers = {value.n for value in self.values if isinstance(value, Estimate | Ranged)}
        return ", ".join(map(str, sorted(numbers))) or ABSENT


@dataclass(frozen=True)
class Table:
    """Rows in the order in which they are shown. Raises ValueError naming a row with too few or too many values."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    label: str = "method"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}, row {row.name!r}: {len(row.values)} values for {len(self.columns)} columns"
                )


def markdown_table(table: Table) -> str:
    """GitHub's Markdown; the best of a column is bold."""
    header, rows = _texts(table, lambda text: f"**{text}**")
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[re.sub(r"([|<\\])", r"\\\1", cell) for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def console_table(table: Table) -> str:
    """Aligned plain text; the best of a column carries a star."""
    header, rows = _texts(table, lambda text: f"*{text}")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows)]
    return "\n".join([table.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def html_table(table: Table) -> Markup:
    """A <table> with the title as its caption; the best of a column is bold."""
    header, rows = _texts(table, lambda text: element("strong", text))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    return element(
        "table",
        element("caption", table.title),
        element("thead", element("tr", *(element("th", cell, scope="col") for cell in header))),
        element("tbody", join(*body)),
        class_="results",
    )


def _texts(table: Table, mark: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, last the column n; the best values are marked."""
    columns = list(zip(*(row.values for row in table.rows), strict=True)) or [() for _ in table.columns]
    cells = [_column(column, values, mark) for column, values in zip(table.columns, columns, strict=True)]
    header = [table.label, *(column.header for column in table.columns), "n"]
    return header, [[row.name, *(column[i] for column in cells), row.runs] for i, row in enumerate(table.rows)]


def _column(column: Column, values: Sequence[Value], mark: Callable[[str], str]) -> list[str]:
    texts = [_text(column, value) for value in values]
    numbers = [_number(value) for value in values]
    finite = [number for number in numbers if math.isfinite(number)]
    if column.best is None or len(finite) < 2:
        return texts
    best = max(finite) if column.best == "max" else min(finite)
    return [mark(text) if number == best else text for text, number in zip(texts, numbers, strict=True)]


def _text(column: Column, value: Value) -> str:
    if value is None:
        return ABSENT

    def rounded(number: float) -> str:
        # z: no minus sign in front of a rounded zero.
        return f"{(100 if column.percent else 1) * number:z.{column.digits}f}"

    text = rounded(_number(value))
    if isinstance(value, Estimate):
        return f"{text} ± {rounded(value.standard_error)}"
    if isinstance(value, Ranged) and value.interval is not None:
        return f"{text} [{', '.join(map(rounded, value.interval))}]"
    return text


def _number(value: Value) -> float:
    if value is None:
        return math.nan
    return value.value if isinstance(value, Estimate | Ranged) else value
