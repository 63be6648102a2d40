"""Tables of methods and their figures, for a page, a README and a terminal; of texts; and whole runs side by side."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from sysdpo_jax.evaluation.preferences import Estimate

ABSENT = "–"  # noqa: RUF001


Value = Estimate | float | int | None


@dataclass(frozen=True)
class Column:
    """A figure.

    Args:
        name: Of the column.
        digits: After the point.
        percent: Whether its values are shares in [0, 1], shown times 100.
        best: Which value is marked.
    """

    name: str
    digits: int = 3
    percent: bool = False
    best: Literal["max", "min"] | None = "max"

    @property
    def header(self) -> str:
        return f"{self.name} (%)" if self.percent else self.name


@dataclass(frozen=True)
class Row:
    """A method and its figures. An estimate is shown with its interval, without one with its standard error.

    Args:
        name: Of the method.
        values: For each column an estimate, a plain number, or None for none.
    """

    name: str
    values: tuple[Value, ...]

    @property
    def runs(self) -> str:
        """The number of runs behind the row's estimates; several, joined by commas, where they differ."""
        numbers = {value.n for value in self.values if isinstance(value, Estimate)}
        return ", ".join(map(str, sorted(numbers))) or ABSENT


class Cell(NamedTuple):
    """What a table shows of a value. best: of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows in the order in which they are shown.

    Args:
        title: Above them.
        columns: The figures.
        rows: The methods.
        label: What the rows' names are.

    Raises:
        ValueError: Naming a row with too few or too many values.
    """

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

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the columns; the first is of the rows' names, the last of their number of runs."""
        return (self.label, *(column.header for column in self.columns), "n")

    def cells(self) -> Iterator[tuple[Cell, ...]]:
        """Lay the table out.

        Yields:
            A row's cells, as many as the header has.
        """
        columns = zip(*(row.values for row in self.rows), strict=True)
        shown = [_cells(column, values) for column, values in zip(self.columns, columns, strict=False)]
        for number, row in enumerate(self.rows):
            yield (Cell(row.name), *(cells[number] for cells in shown), Cell(row.runs))


@dataclass(frozen=True, eq=False)
class ShownRun:
    """A run.

    Args:
        method: What made it.
        values: Of all nodes, in order; arrays are pictures.
        score: A text.
    """

    method: str
    values: Mapping[str, Any]
    score: str


@dataclass(frozen=True, eq=False)
class ComparedRuns:
    """Runs of several methods on the same inputs and seed.

    Args:
        title: Above them.
        inputs: `{input: value}`.
        runs: One a method.

    Raises:
        ValueError: Where they are not of the same nodes.
    """

    title: str
    inputs: Mapping[str, Any]
    runs: tuple[ShownRun, ...]

    def __post_init__(self) -> None:
        for run in self.runs[1:]:
            if list(run.values) != list(self.runs[0].values):
                raise ValueError(f"runs {self.title!r}: {run.method!r} has other nodes than {self.runs[0].method!r}")

    @property
    def rows(self) -> Iterator[tuple[str, list[Any]]]:
        """A name, and one value or one of each run: the inputs, the scores, and the nodes in the order of the graph."""
        yield from ((name, [value]) for name, value in self.inputs.items())
        yield "score", [run.score for run in self.runs]
        yield from ((name, [run.values[name] for run in self.runs]) for name in self.runs[0].values)


@dataclass(frozen=True)
class TextTable:
    """Cells of plain text under a header.

    Args:
        title: Above them.
        header: Names of the columns.
        rows: As many cells each.

    Raises:
        ValueError: Naming a row with too few or too many cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(f"table {self.title!r}, row {number}: {len(row)} cells for {len(self.header)} columns")


def markdown_table(table: Table) -> str:
    """GitHub's Markdown; the best of a column is bold.

    Args:
        table: To be shown.

    Returns:
        The text.
    """

    def line(cells: Sequence[Cell]) -> str:
        texts = [re.sub(r"([|<\\])", r"\\\1", " ".join(cell.text.split())) for cell in cells]
        return f"| {' | '.join(f'**{t}**' if cell.best else t for t, cell in zip(texts, cells, strict=True))} |"

    rule = f"| {' | '.join(['---', *['---:'] * (len(table.header) - 1)])} |"
    return "\n".join([line([*map(Cell, table.header)]), rule, *map(line, table.cells())])


def console_table(table: Table) -> str:
    """Aligned plain text; the best of a column carries a star.

    Args:
        table: To be shown.

    Returns:
        The text.
    """
    rows = [table.header, *([f"{'*' * cell.best}{cell.text}" for cell in row] for row in table.cells())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([table.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def compare_runs(made: Mapping[str, Mapping[str, Any]], inputs: Sequence[str], nodes: Sequence[str]) -> ComparedRuns:
    """{method: run} of one prompt and seed, as a runs file has them ("id", "inputs", "outputs" and "score").

    The others' scores say whether they won against the first one's.
    """
    first, *_ = made.values()
    shown = (
        ShownRun(method, {name: value for name, value in run["outputs"].items() if name in nodes}, _score(run, first))
        for method, run in made.items()
    )
    return ComparedRuns(f"run {first['id']}", {name: first["inputs"][name] for name in inputs}, tuple(shown))


def spread(number: int, shown: int) -> list[int]:
    """Indices of at most `shown` of so many, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, min(number, shown)).round().astype(int)).tolist()


def _score(run: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    scores: Sequence[float | None] = (run["score"], before["score"])
    if scores[0] is None:
        return "none"
    if run is before or scores[1] is None:
        return f"{scores[0]:.4g}"
    verdict = "win" if scores[0] > scores[1] else "loss" if scores[0] < scores[1] else "tie"
    return f"{scores[0]:.4g} ({verdict})"


def _cells(column: Column, values: Sequence[Value]) -> list[Cell]:
    numbers = [_number(value) for value in values]
    finite = [number for number in numbers if math.isfinite(number)]
    marked = column.best is not None and len(finite) > 1
    best = (max if column.best == "max" else min)(finite) if marked else None
    return [Cell(_text(column, value), number == best) for value, number in zip(values, numbers, strict=True)]


def _text(column: Column, value: Value) -> str:
    if value is None:
        return ABSENT

    def rounded(number: float) -> str:
        # z: no minus sign in front of a rounded zero.
        return f"{(100 if column.percent else 1) * number:z.{column.digits}f}"

    text = rounded(_number(value))
    if not isinstance(value, Estimate):
        return text
    if value.interval is not None:
        return f"{text} [{', '.join(map(rounded, value.interval))}]"
    return text if value.standard_error is None else f"{text} ± {rounded(value.standard_error)}"


def _number(value: Value) -> float:
    if value is None:
        return math.nan
    return value.value if isinstance(value, Estimate) else value
