"""report.html and results.json of a run, from what its folder holds."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli.held_out import FOLDER, runs_name
from sysdpo_jax.cli.run import DATA, Run
from sysdpo_jax.cli.runs_file import run_lines, with_images
from sysdpo_jax.io import write_whole
from sysdpo_jax.report import ComparedRuns, write_report
from sysdpo_jax.report.outcome import summary
from sysdpo_jax.report.samples import compare_runs, spread
from sysdpo_jax.report.training import compared_steps, run_report, run_results
from sysdpo_jax.training.metrics import read_metrics


def result_lines(run: Run) -> list[str]:
    """The result in sentences, as the terminal and the report have it."""
    return list(summary(_metrics(run), run.config.schedule.steps))


def write_run_report(run: Run, arguments: Sequence[str], began: float) -> Path:
    """Write report.html, whose path is returned, and results.json into the run's folder, in one process.

    began: `time.monotonic()` of the start. Raises what reading the runs of evaluations and writing raise.
    """
    folder, rows = Path(run.config.directory), _metrics(run)
    made_by = {
        "command": " ".join(["python -m sysdpo_jax.cli.train", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds of this start": round(time.monotonic() - began, 1),
    }
    data = json.loads((folder / DATA).read_text(encoding="utf-8"))
    results = run_results(rows, run.config.schedule.steps) | {"data": data, "made_by": made_by}
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    title = f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system"
    configuration = {name: value for name, value in asdict(run.config).items() if name != "directory"}
    runs = tuple(_compared_runs(run, compared_steps(rows)))
    write_report(folder / "report.html", run_report(title, rows, results, run.system, configuration, runs))
    return folder / "report.html"


def _metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(Path(run.config.directory) / "metrics.jsonl")


def _compared_runs(run: Run, steps: Mapping[str, int]) -> Iterator[ComparedRuns]:
    """The first run of some prompts at the evaluations of `steps`, {name: step}, that before training first.

    As many prompts as `evaluation.shown`, evenly spaced: nobody chose them.
    """
    firsts = {name: _first_runs(run, step) for name, step in steps.items()}
    # A tool may have left a run out of one of them.
    both = [name for name in next(iter(firsts.values()), {}) if all(name in runs for runs in firsts.values())]
    for place in spread(len(both), run.config.evaluation.shown):
        made = {name: runs[both[place]] for name, runs in firsts.items()}
        whole = {name: with_images(line, path) for name, (line, path) in made.items()}
        yield compare_runs(whole, run.system.inputs, [node.name for node in run.system.nodes])


def _first_runs(run: Run, step: int) -> dict[str, tuple[dict[str, Any], Path]]:
    """{id: line and file} of the first run of each prompt."""
    path = Path(run.config.directory) / FOLDER / runs_name(step)
    return {line["id"]: (line, path) for line in run_lines(path) if line["id"].endswith("-0")}
