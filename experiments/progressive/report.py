"""The results of the experiment for people: the table, report.html, and a picture of sequences before and after."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.runs import Figures
from experiments.progressive.run import SeedRun
from experiments.progressive.world import split_captions
from sysdpo_jax.evaluation import Estimate
from sysdpo_jax.io import write_whole
from sysdpo_jax.report import (
    Column,
    ImageRow,
    ImageSequence,
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

SHOWN = ("before", "sysdpo", "sysdpo_online")
DESCRIPTION = (
    "A request asks for three pictures in which an attribute grows or shrinks. A language model writes three captions, "
    "a diffusion model draws them, and a judge measures the pictures. Figures are of held-out requests. Standard "
    "errors are clustered by request and seed; what another training seed would change is not in them, so the tables "
    "by seed stand beside."
)


def results_table(results: Mapping[str, Any], title: str = "Held-out requests, all seeds") -> Table:
    """One row a method."""
    return _table(results["methods"], title)


def write(
    folder: Path, results: Mapping[str, Any], runs: Mapping[int, SeedRun], figures: Mapping[int, Mapping[str, Figures]]
) -> None:
    """report.html, table.md and sequences.png in the folder."""
    seed = min(runs)
    rows = _sequences(figures[seed])
    metrics = {
        path.parent.name: read_metrics(path) for path in sorted((folder / f"seed-{seed}").glob("*/metrics.jsonl"))
    }
    by_seed = [_table(rows_of, f"Seed {name}") for name, rows_of in results["by_seed"].items()]
    report = Report(
        title="Progressive images: a language model and a diffusion model aligned as one system",
        description=DESCRIPTION,
        tables=(results_table(results), _differences(results["differences"]), *by_seed),
        figures=learning_figures(metrics),
        images=rows,
        system=runs[seed].system,
        configuration={name: str(value) for name, value in asdict(runs[seed].config).items()},
        made_by={name: str(value) for name, value in results["made_by"].items()},
    )
    write_report(folder / "report.html", report)
    write_whole(folder / "table.md", markdown_table(results_table(results)) + "\n")
    image_grid(rows[:6]).save(folder / "sequences.png")


def print_table(results: Mapping[str, Any]) -> None:
    """The table on standard output."""
    print(console_table(results_table(results)))


def _table(methods: Mapping[str, Mapping[str, float]], title: str) -> Table:
    columns = (
        Column("preference score"),
        Column("order consistency", digits=1, percent=True),
        Column("well-formed answers", digits=1, percent=True, best=None),
        Column("answer entropy (nats)", digits=2, best=None),
        Column("drawing error", best=None),
    )
    rows = tuple(
        Row(
            name,
            (
                Estimate(row["preference_score"], row["preference_score_se"], int(row["n"])),
                Estimate(row["order_consistency"], row["order_consistency_se"], int(row["n"])),
                row["well_formed"],
                row["caption_entropy"],
                row["fidelity_error"],
            ),
        )
        for name, row in methods.items()
    )
    return Table(title, columns, rows)


def _differences(differences: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    columns = (
        Column("preference score", best=None),
        Column("order consistency", digits=1, percent=True, best=None),
        Column("win rate", digits=1, percent=True, best=None),
    )
    rows = tuple(
        Row(name, tuple(Estimate(e["value"], e["standard_error"], int(e["n"])) for e in row.values()))
        for name, row in differences.items()
    )
    return Table("Paired differences: same requests, same noise", columns, rows, label="comparison")


def _sequences(figures: Mapping[str, Figures]) -> tuple[ImageRow, ...]:
    """The first run of each request, for the methods that are shown."""
    texts, first = np.unique(figures[SHOWN[0]]["request"], return_index=True)
    return tuple(
        ImageRow(
            str(text),
            tuple(
                ImageSequence(
                    method,
                    figures[method]["images"][row].astype(np.float64),
                    tuple(split_captions(str(figures[method]["answer"][row]))),
                )
                for method in SHOWN
            ),
        )
        for text, row in zip(texts, first, strict=True)
    )
