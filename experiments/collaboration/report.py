"""The results of the experiment for people: the table, and report.html with drafts and answers before and after."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.collaboration.run import SeedRun
from experiments.collaboration.task import ANSWER, DRAFT
from experiments.common.runs import Figures
from sysdpo_jax.evaluation import Estimate
from sysdpo_jax.io import write_whole
from sysdpo_jax.report import (
    Column,
    Report,
    Row,
    Table,
    TextTable,
    console_table,
    learning_figures,
    markdown_table,
    write_report,
)
from sysdpo_jax.training import read_metrics

SHOWN = ("prompted", "sysdpo_sampling")
QUESTIONS_SHOWN = 12
DESCRIPTION = (
    "A first language model drafts, a second one turns the draft into the answer and sees only a part of the question. "
    "A program checks the answer alone. Figures are of sampled runs on held-out questions. Standard errors are "
    "clustered by question and seed; what another training seed would change is not in them, so the tables by seed "
    "stand beside."
)


def results_table(results: Mapping[str, Any], title: str = "Held-out questions, all seeds") -> Table:
    """One row a method."""
    return _table(results["methods"], title)


def write(
    folder: Path, results: Mapping[str, Any], runs: Mapping[int, SeedRun], figures: Mapping[int, Mapping[str, Figures]]
) -> None:
    """report.html and table.md in the folder."""
    seed = min(runs)
    metrics = {
        path.parent.name: read_metrics(path) for path in sorted((folder / f"seed-{seed}").glob("*/metrics.jsonl"))
    }
    by_seed = [_table(rows_of, f"Seed {name}") for name, rows_of in results["by_seed"].items()]
    report = Report(
        title="Two language models in sequence, aligned as one system",
        description=DESCRIPTION,
        tables=(results_table(results), _differences(results), *by_seed),
        figures=learning_figures(metrics),
        texts=(_samples(runs[seed], figures[seed]),),
        system=runs[seed].system,
        configuration={name: str(value) for name, value in asdict(runs[seed].config).items()},
        made_by={name: str(value) for name, value in results["made_by"].items()},
    )
    write_report(folder / "report.html", report)
    write_whole(folder / "table.md", markdown_table(results_table(results)) + "\n")


def print_table(results: Mapping[str, Any]) -> None:
    """The table on standard output."""
    print(console_table(results_table(results)))


def _table(methods: Mapping[str, Mapping[str, float]], title: str) -> Table:
    figures = _figures(methods)
    columns = tuple(Column(name, digits=1, percent=True) for name in figures.values())
    rows = tuple(
        Row(name, tuple(Estimate(row[figure], row[f"{figure}_se"], int(row["n"])) for figure in figures))
        for name, row in methods.items()
    )
    return Table(title, columns, rows)


def _figures(methods: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """{figure: its column}. Where every answer is right or wrong and nothing between, the score says nothing more."""
    graded = any(row["score"] != row["accuracy"] for row in methods.values())
    return {"accuracy": "right answers", "score": "score"} if graded else {"accuracy": "right answers"}


def _differences(results: Mapping[str, Any]) -> Table:
    figures = _figures(results["methods"])
    columns = tuple(Column(name, digits=1, percent=True, best=None) for name in figures.values())
    rows = tuple(
        Row(name, tuple(Estimate(e["value"], e["standard_error"], int(e["n"])) for e in (row[f] for f in figures)))
        for name, row in results["differences"].items()
    )
    return Table("Paired differences: same questions, same noise", columns, rows, label="comparison")


def _samples(run: SeedRun, figures: Mapping[str, Figures]) -> TextTable:
    """The first run of the first questions, for the methods that are shown."""
    inputs = run.system.inputs
    header = (*inputs, *(f"{node}, {method}" for method in SHOWN for node in (DRAFT, ANSWER)))
    rows = []
    for number in range(min(QUESTIONS_SHOWN, len(set(figures[SHOWN[0]]["question"])))):
        row = number * run.config.test_samples
        cells = [str(figures[SHOWN[0]][name][row]) for name in inputs]
        for method in SHOWN:
            mark = "right" if figures[method]["right"][row] else "wrong"
            cells += [str(figures[method][DRAFT][row]), f"{figures[method][ANSWER][row]} ({mark})"]
        rows.append(tuple(cells))
    return TextTable("Held-out questions: one run each", header, tuple(rows))
