"""What systems made of the same inputs and seeds, side by side: whole runs, and tables of texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


def compare_runs(made: Mapping[str, Mapping[str, Any]], inputs: Sequence[str], nodes: Sequence[str]) -> ComparedRuns:
    """{method: run} of one prompt and seed, as a runs file has them ("id", "inputs", "outputs" and "score").

    The others' scores say whether they won against the first one's.
    """
    first, *_ = made.values()
    shown = (
        ShownRun(method, {name: run["outputs"][name] for name in nodes}, _score(run, first))
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
