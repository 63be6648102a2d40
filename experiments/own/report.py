"""report.html and results.json of a run: what changed since the first evaluation, and how training went."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

import sysdpo_jax as sj
from experiments.own.config import write_whole
from experiments.own.evaluation import FOLDER, runs_name
from experiments.own.run import BEST, DATA, Run
from experiments.own.runs_file import run_lines, with_images
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

# {name: the first runs of an evaluation}, the same prompts of each.
Samples: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]
# Of these the last values say how training ended.
ENDED = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
DESCRIPTION = """
The system was aligned from {pairs} preferences on its runs with SysDPO-{kind} (arXiv 2502.17721): one loss for all
components that are trained.

Figures of evaluation are of held-out prompts, with the noise of the first evaluation, which is the system before
training; the win rate is the share of runs with a higher score than that system's, a tie counting half. Errors are
standard errors, clustered by prompt. The best evaluation is chosen by these very prompts, which favours it a little.
"""


def write_run_report(run: Run, arguments: Sequence[str], began: float) -> Path:
    """Write report.html and results.json into the run's folder, in one process; the report's path.

    began: `time.monotonic()` of the start.
    """
    folder = Path(run.config.directory)
    rows = read_metrics(folder / "metrics.jsonl")
    best = best_evaluation(rows)
    samples = _first_runs(run, folder, dict(_compared(rows, best)))
    made_by = {
        "command": " ".join(["python -m experiments.train", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds of this start": round(time.monotonic() - began, 1),
    }
    results = _results(rows, best) | {
        "data": json.loads((folder / DATA).read_text(encoding="utf-8")),
        "made_by": made_by,
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    kept = {name: value for name, value in asdict(run.config).items() if name != "directory"}
    report = Report(
        title=f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system",
        description=_description(run, rows, best, results["data"]["kept"]),
        tables=(_evaluations(rows, best),) if samples else (),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        images=tuple(_images(run, samples)),
        texts=tuple(_texts(run, samples)),
        system=run.system,
        configuration=kept,
        made_by=made_by,
    )
    write_report(folder / "report.html", report)
    return folder / "report.html"


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the best evaluation, of equal ones the last, as of checkpoints; None where none is.

    It is 0 where every later one is worse than the system before training.
    """
    metric, mode = BEST
    sign = 1 if mode == "max" else -1
    graded = [(sign * row[metric], row["step"]) for row in rows if row.get(metric) is not None]
    return max(graded)[1] if graded else None


def _results(rows: Sequence[Mapping[str, Any]], best: int | None) -> dict[str, Any]:
    """The figures of the report, to be read by programs; docs/metrics.md has their names."""
    return {
        "evaluations": [row for row in rows if row.get(BEST[0]) is not None],
        "best_step": best,
        "training": _last_figures(rows),
        "warnings": list(run_warnings(rows)),
    }


def _last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [row for row in rows if "loss" in row]
    return {name: trained[-1].get(name) for name in ("step", *ENDED)} if trained else {}


def _compared(rows: Sequence[Mapping[str, Any]], best: int | None) -> Iterator[tuple[str, int]]:
    """The system before training, and the best one; the last one where none is better."""
    if best is not None:
        yield "before", 0
        last = max(row["step"] for row in rows if row.get(BEST[0]) is not None)
        if last > 0:
            yield f"after {best or last} steps", best or last


def _first_runs(run: Run, folder: Path, steps: Mapping[str, int]) -> Samples:
    """The first runs that all of these evaluations have. steps: by name."""
    paths = {name: folder / FOLDER / runs_name(step) for name, step in steps.items()}
    ids = [{line["id"] for line in run_lines(path)} for path in paths.values()]
    both = set.intersection(*ids) if ids else set()
    return {
        name: [
            with_images(line, path)
            for line in islice((line for line in run_lines(path) if line["id"] in both), run.config.evaluation.shown)
        ]
        for name, path in paths.items()
    }


def _description(run: Run, rows: Sequence[Mapping[str, Any]], best: int | None, pairs: int) -> str:
    text = DESCRIPTION.format(kind=run.config.objective.kind.capitalize(), pairs=pairs)
    if not any(row["step"] > 0 and row.get(BEST[0]) is not None for row in rows):
        return text
    if best == 0:
        return f"No evaluation found the system better than it was before training.\n{text}"
    row = next(row for row in rows if row["step"] == best and row.get(BEST[0]) is not None)
    wins, low, high = (100 * row[f"{BEST[0]}{end}"] for end in ("", "/low", "/high"))
    certain = "" if low > 50 or high < 50 else ", which chance alone could give"
    return (
        f"After {best} steps, the best of its evaluations, the system wins {wins:.1f}% of {int(row['eval/runs'])} runs "
        f"against itself before training (95% interval {low:.1f} to {high:.1f}){certain}.\n{text}"
    )


def _evaluations(rows: Sequence[Mapping[str, Any]], best: int | None) -> Table:
    columns = (Column("score"), Column("win rate", digits=1, percent=True))
    made = [
        Row(
            f"step {row['step']}" + (", best" if row["step"] == best else ""),
            tuple(_estimate(row, name) for name in ("score", "win_rate")),
        )
        for row in rows
        if row.get("eval/score") is not None
    ]
    return Table("Evaluations on held-out prompts", columns, tuple(made), label="after")


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    half = (row[f"eval/{name}/high"] - row[f"eval/{name}/low"]) / 2
    return Estimate(row[f"eval/{name}"], half / CONFIDENCE, int(row["eval/runs"]))


def _images(run: Run, samples: Samples) -> Iterator[ImageRow]:
    """Every image node's pictures of the first prompts, before and after; captions are what each copy read."""
    for node in run.system.nodes if samples else ():
        if isinstance(node.component, TextToImage):
            for made in zip(*samples.values(), strict=True):
                sequences = (_sequence(name, node, one) for name, one in zip(samples, made, strict=True))
                yield ImageRow(_prompt(run, made[0]), tuple(sequences))


def _sequence(method: str, node: sj.Node, run: Mapping[str, Any]) -> ImageSequence:
    images, captions = run["outputs"][node.name], {**run["inputs"], **run["outputs"]}[node.parents[0]]
    if node.plate is None:
        images = [images]
    captions = captions if isinstance(captions, list) else [captions] * len(images)
    return ImageSequence(method, np.stack([np.asarray(image) for image in images]), tuple(captions))


def _texts(run: Run, samples: Samples) -> Iterator[TextTable]:
    """The values of every other node of the first prompts, before and after."""
    for node in run.system.nodes if samples else ():
        rows = [
            (_prompt(run, made[0]), *(str(one["outputs"][node.name]) for one in made))
            for made in zip(*samples.values(), strict=True)
            if not any(_holds_image(one["outputs"][node.name]) for one in made)
        ]
        if rows:
            yield TextTable(node.name, ("prompt", *samples), tuple(rows))


def _holds_image(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, list) and any(map(_holds_image, value)))


def _prompt(run: Run, made: Mapping[str, Any]) -> str:
    return ", ".join(str(made["inputs"][name]) for name in run.system.inputs)
