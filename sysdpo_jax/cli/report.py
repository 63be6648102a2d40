"""Write a run's report.html again: what changed since the first evaluation, and how training went.

example:
  sysdpo report --directory runs/my_run

The figures are those in the run's folder; nothing is sampled or scored. A run that is going on is left as it is.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli import command_line
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import write_whole
from sysdpo_jax.locks import locked_folder
from sysdpo_jax.report import Column, Ranged, Report, Row, Table, run_figures, run_warnings, write_report
from sysdpo_jax.runs.config import MeshConfig
from sysdpo_jax.runs.files import CONFIG, read_config
from sysdpo_jax.runs.outcome import ENDED, best_evaluation, evaluations, final_figures, interval_of, summary
from sysdpo_jax.runs.run import DATA, Run, assemble
from sysdpo_jax.runs.shown import compared_runs
from sysdpo_jax.training.metrics import read_metrics

DESCRIPTION = """
The system was aligned from {pairs} preferences on its runs with SysDPO-{kind} (arXiv 2502.17721): one loss for all
components that are trained.
"""
EVALUATION = """
Figures of evaluation are of held-out prompts, with the noise of the first evaluation, which is the system before
training; the win rate is the share of runs with a higher score than that system's, a tie counting half. Brackets hold
95% intervals, which know that runs of a prompt are alike: Wilson's of shares, Student's of other scores. The best
evaluation is chosen by these very prompts, which favours it a little. The runs below are the first of each of some
prompts, evenly spaced over the file.
"""


@dataclass(frozen=True)
class Config:
    """Of which run.

    Args:
        directory: Of the run.
    """

    directory: Path


def run(config: Config) -> None:
    """Write the report, and print its path. Raises `ConfigError` where the folder holds no run."""
    path = config.directory / CONFIG
    if not path.is_file() or not (config.directory / DATA).is_file():
        raise ConfigError(f"{config.directory} is no folder of a run ({CONFIG} is missing): give what it trained in")
    began, results = time.monotonic(), config.directory / "results.json"
    with locked_folder(config.directory):
        made = assemble(replace(read_config(path), directory=str(config.directory.absolute()), mesh=MeshConfig()))
        known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        print(write_run_report(made, known.get("made_by") or made_by(time.monotonic() - began)))


def result_lines(run: Run) -> list[str]:
    """The result in sentences, as the terminal and the report have it."""
    return list(summary(_metrics(run), run.config.schedule.steps))


def made_by(seconds: float) -> dict[str, Any]:
    """What a report says of the command that made it. seconds: that it took."""
    return {
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds of this start": round(seconds, 1),
    }


def write_run_report(run: Run, made_by: Mapping[str, Any]) -> Path:
    """Write report.html, whose path is returned, and results.json into the run's folder, in one process.

    Raises what reading the runs of evaluations and writing raise.
    """
    folder, rows, said = Path(run.config.directory), _metrics(run), result_lines(run)
    results = _results(rows, said) | {
        "data": json.loads((folder / DATA).read_text(encoding="utf-8")),
        "made_by": dict(made_by),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    report = Report(
        title=f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system",
        headline=tuple(f"{text[0].upper()}{text[1:]}." for text in said),
        description=DESCRIPTION.format(kind=run.config.objective.kind.capitalize(), pairs=results["data"]["kept"])
        + (EVALUATION if evaluations(rows) else ""),
        tables=tuple(_table(rows)),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        runs=tuple(compared_runs(run, _compared(rows))),
        system=run.system,
        configuration={name: value for name, value in asdict(run.config).items() if name != "directory"},
        made_by=dict(made_by),
    )
    write_report(folder / "report.html", report)
    return folder / "report.html"


def _metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(Path(run.config.directory) / "metrics.jsonl")


def _results(rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> dict[str, Any]:
    """The figures of the report, to be read by programs; docs/metrics.md has their names."""
    return {
        "summary": list(said),
        "final": final_figures(rows),
        "evaluations": evaluations(rows),
        "best_step": best_evaluation(rows),
        "training": _last_figures(rows),
        "warnings": list(run_warnings(rows)),
    }


def _last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [row for row in rows if "loss" in row]
    return {name: trained[-1].get(name) for name in ("step", *ENDED)} if trained else {}


def _compared(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{name: step} of the evaluations that runs are shown of."""
    final = final_figures(rows)
    after = {f"after {final['step']:.0f} steps": int(final["step"])} if final else {}
    return {"before training": 0, **after} if evaluations(rows) else {}


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The evaluations; the win rate first, for a telephone is narrow."""
    made, best = evaluations(rows), best_evaluation(rows)
    columns = (Column("win rate", digits=1, percent=True), Column("score"), Column("change"))
    if made:
        shown = tuple(
            Row(f"step {row['step']}" + (", best" if row["step"] == best else ""), tuple(_values(row))) for row in made
        )
        yield Table("Evaluations on held-out prompts, with 95% intervals", columns, shown, label="after")


def _values(row: Mapping[str, Any]) -> Iterator[Ranged | None]:
    for name in ("eval/win_rate", "eval/score", "eval/score_difference"):
        # Before training the system is compared with itself.
        known = row["step"] > 0 or name == "eval/score"
        yield Ranged(row[name], interval_of(row, name), int(row["eval/runs"])) if known else None
