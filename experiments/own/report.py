"""report.html of a run: what changed between the first and the last evaluation, and how training went."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sysdpo_jax as sj
from experiments.own.evaluation import FOLDER
from experiments.own.run import Run
from experiments.own.runs_file import read_runs
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.evaluation import (
    Column,
    Estimate,
    ImageRow,
    ImageSequence,
    Report,
    Row,
    Table,
    TextTable,
    run_figures,
    run_warnings,
    write_report,
)
from sysdpo_jax.evaluation.preferences import CONFIDENCE
from sysdpo_jax.training.metrics import read_metrics

DESCRIPTION = """
The system was aligned from preferences on its runs with SysDPO-{kind} (arXiv 2502.17721): one loss for all components
that are trained.

Figures of evaluation are of held-out prompts, with the noise of the first evaluation, which is the system before
training; the win rate is the share of runs with a higher score than that system's, a tie counting half. Errors are
standard errors, clustered by prompt.
"""


def write_run_report(run: Run, arguments: Sequence[str], began: float) -> Path:
    """Write report.html into the run's folder, in one process. began: `time.monotonic()` of the start."""
    folder = Path(run.config.directory)
    evaluated = [read_runs(path) for path in _first_and_last(folder)]
    rows = read_metrics(folder / "metrics.jsonl")
    kept = {name: value for name, value in asdict(run.config).items() if name != "directory"}
    report = Report(
        title=f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system",
        description=DESCRIPTION.format(kind=run.config.objective.kind.capitalize()),
        tables=(_evaluations(rows),) if evaluated else (),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        images=tuple(_images(run, evaluated)),
        texts=tuple(_texts(run, evaluated)),
        system=run.system,
        configuration=kept,
        made_by={
            "command": " ".join(["python -m experiments.train", *arguments]),
            "date": time.strftime("%Y-%m-%d"),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "seconds of this start": round(time.monotonic() - began, 1),
        },
    )
    write_report(folder / "report.html", report)
    return folder / "report.html"


def _first_and_last(folder: Path) -> list[Path]:
    """The runs of the system before training and at the end."""
    paths = sorted((folder / FOLDER).glob("runs-*.jsonl"))
    return [paths[0], paths[-1]] if paths else []


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (Column("score"), Column("win rate", digits=1, percent=True))
    made = [
        Row(f"step {row['step']}", tuple(_estimate(row, name) for name in ("score", "win_rate")))
        for row in rows
        if row.get("eval/score") is not None
    ]
    return Table("Evaluations on held-out prompts", columns, tuple(made), label="after")


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    half = (row[f"eval/{name}/high"] - row[f"eval/{name}/low"]) / 2
    return Estimate(row[f"eval/{name}"], half / CONFIDENCE, int(row["eval/runs"]))


def _images(run: Run, evaluated: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[ImageRow]:
    """Every image node's pictures of the first prompts, before and after; captions are what each copy read."""
    for node in run.system.nodes if evaluated else ():
        if isinstance(node.component, TextToImage):
            for before, after in list(zip(*evaluated, strict=True))[: run.config.evaluation.shown]:
                yield ImageRow(
                    _prompt(run, before),
                    tuple(_sequence(name, node, r) for name, r in (("before", before), ("after", after))),
                )


def _sequence(method: str, node: sj.Node, run: Mapping[str, Any]) -> ImageSequence:
    images, captions = run["outputs"][node.name], {**run["inputs"], **run["outputs"]}[node.parents[0]]
    if node.plate is None:
        images = [images]
    captions = captions if isinstance(captions, list) else [captions] * len(images)
    return ImageSequence(method, np.stack([np.asarray(image) for image in images]), tuple(captions))


def _texts(run: Run, evaluated: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[TextTable]:
    """Every text node's values of the first prompts, before and after."""
    for node in run.system.nodes if evaluated else ():
        if isinstance(node.component, sj.LanguageModel):
            rows = [
                (_prompt(run, before), str(before["outputs"][node.name]), str(after["outputs"][node.name]))
                for before, after in list(zip(*evaluated, strict=True))[: run.config.evaluation.shown]
            ]
            yield TextTable(node.name, ("prompt", "before", "after"), tuple(rows))


def _prompt(run: Run, made: Mapping[str, Any]) -> str:
    return ", ".join(str(made["inputs"][name]) for name in run.system.inputs)
