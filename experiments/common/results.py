"""From figures of held-out runs to results.json, table.md and report.html.

Errors are clustered by seed and input: runs of one are alike. The training seeds count as fixed: the errors leave out
what another seed would change, so figures by seed stand beside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from experiments.common.runs import ExperimentConfig, Figures, SeedRun
from sysdpo_jax.evaluation import Estimate, clustered_mean, paired_difference, win_rate
from sysdpo_jax.io import write_json, write_whole
from sysdpo_jax.report import (
    Column,
    Report,
    Row,
    Table,
    console_table,
    image_grid,
    learning_figures,
    markdown_table,
    write_report,
)
from sysdpo_jax.training import read_metrics


class Figure(NamedTuple):
    """A figure of a method. source: the column of its runs; error: whether it has one, and is compared."""

    source: str
    column: Column
    error: bool = True


WIN_RATE = Column("win rate", digits=1, percent=True)


@dataclass(frozen=True)
class Results:
    """What is said of an experiment.

    inputs: what its runs are of, in the plural; cluster: the column that says of which. comparisons: of a method and
    another one. wins: whether they have a win rate of the score. samples: what the report has of one seed's runs.
    """

    title: str
    description: str
    inputs: str
    cluster: str
    figures: Mapping[str, Figure]
    comparisons: Sequence[tuple[str, str]]
    samples: Callable[[Any, Mapping[str, Figures]], dict[str, Any]]
    wins: bool = False

    def summarise(self, figures: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
        """figures: {seed: {method: columns}} -> methods (all seeds together and each alone) and paired differences."""
        seeds, methods = sorted(figures), list(figures[min(figures)])
        pooled = {method: self._pool([figures[seed][method] for seed in seeds]) for method in methods}
        return {
            "methods": {method: self._row(columns) for method, columns in pooled.items()},
            "by_seed": {str(seed): {m: self._row(self._pool([figures[seed][m]])) for m in methods} for seed in seeds},
            "differences": {
                f"{a} - {b}": self._difference(pooled[a], pooled[b])
                for a, b in self.comparisons
                if {a, b} <= set(methods)
            },
        }

    def table(self, results: Mapping[str, Any]) -> Table:
        """One row a method."""
        return self._table(results, results["methods"], f"Held-out {self.inputs}, all seeds")

    def write(
        self,
        config: ExperimentConfig,
        runs: Mapping[int, SeedRun],
        figures: Mapping[int, Mapping[str, Figures]],
        how: dict[str, Any],
    ) -> None:
        """results.json, report.html, table.md and, where samples are pictures, sequences.png; prints the table."""
        results, folder, seed = self.summarise(figures) | how, config.folder, min(runs)
        write_json(folder / "results.json", results)
        samples, metrics = self.samples(runs[seed], figures[seed]), runs[seed].folder.glob("*/metrics.jsonl")
        main = self.table(results)
        differences = self._table(
            results, results["differences"], f"Paired differences: same {self.inputs}, same noise", "comparison"
        )
        by_seed = [self._table(results, rows, f"Seed {name}") for name, rows in results["by_seed"].items()]
        report = Report(
            title=self.title,
            description=self.description,
            tables=(main, differences, *by_seed),
            figures=learning_figures({path.parent.name: read_metrics(path) for path in sorted(metrics)}),
            system=runs[seed].system,
            configuration={name: str(value) for name, value in asdict(config.run).items()},
            made_by={name: str(value) for name, value in results["made_by"].items()},
            **samples,
        )
        write_report(folder / "report.html", report)
        write_whole(folder / "table.md", markdown_table(main) + "\n")
        if report.images:
            image_grid(report.images[:6]).save(folder / "sequences.png")
        print(f"{console_table(main)}\n\n{folder / 'results.json'}\n{folder / 'report.html'}")

    def _pool(self, parts: Sequence[Figures]) -> dict[str, np.ndarray]:
        sources = {figure.source for figure in self.figures.values()}
        columns = {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in sources}
        clusters = [[f"{i} {each}" for each in part[self.cluster]] for i, part in enumerate(parts)]
        return columns | {"cluster": np.concatenate(clusters)}

    def _row(self, columns: Figures) -> dict[str, float | int | None]:
        row: dict[str, float | int | None] = {}
        for name, (source, _, error) in self.figures.items():
            if error:
                mean = clustered_mean(columns[source], columns["cluster"])
                row |= {name: mean.value, f"{name}_se": mean.standard_error, "n": mean.n}
            else:
                row[name] = float(columns[source].mean())
        return row | {self.inputs: len(set(columns["cluster"]))}

    def _difference(self, first: Figures, second: Figures) -> dict[str, dict[str, float | int | None]]:
        """Of paired runs: the same input, place and noise."""
        cluster = first["cluster"]
        made = {
            name: paired_difference(first[source], second[source], cluster)
            for name, (source, _, error) in self.figures.items()
            if error
        }
        if self.wins:
            made["win_rate"] = win_rate(first["score"], second["score"], cluster)
        return {name: as_numbers(estimate) for name, estimate in made.items()}

    def _table(
        self, results: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], title: str, label: str = "method"
    ) -> Table:
        """A figure that is another one's equal in all methods says nothing more, and is left out."""
        methods = results["methods"].values()
        distinct = {tuple(row[name] for row in methods): name for name in reversed([*self.figures])}
        columns = {name: figure.column for name, figure in self.figures.items() if name in distinct.values()}
        if label == "comparison":
            columns = {name: replace(each, best=None) for name, each in (columns | {"win_rate": WIN_RATE}).items()}
        columns = {name: each for name, each in columns.items() if all(name in row for row in rows.values())}
        made = [Row(method, tuple(_value(row, name) for name in columns)) for method, row in rows.items()]
        return Table(title, tuple(columns.values()), tuple(made), label)


def as_numbers(estimate: Estimate) -> dict[str, float | int | None]:
    """An estimate as results.json holds it."""
    return {"value": estimate.value, "standard_error": estimate.standard_error, "n": estimate.n}


def _value(row: Mapping[str, Any], name: str) -> Estimate | float:
    if isinstance(row[name], Mapping):
        return Estimate(**row[name])
    return Estimate(row[name], row[f"{name}_se"], row["n"]) if f"{name}_se" in row else row[name]
