"""report.html and results.json of a run: what changed since the first evaluation, and how training went."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli.outcome import best_evaluation, evaluations, final_figures, interval_of, summary
from sysdpo_jax.cli.run import DATA, Run, best_of, is_online, round_store
from sysdpo_jax.cli.shown import compared_runs
from sysdpo_jax.io import write_whole
from sysdpo_jax.report import Column, Ranged, Report, Row, Table, run_figures, run_warnings, write_report
from sysdpo_jax.runs.round_store import RoundSummary
from sysdpo_jax.training.checkpoints import Best
from sysdpo_jax.training.metrics import read_metrics

# Of these the last values say how training ended.
ENDED = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
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


def result_lines(run: Run) -> list[str]:
    """The result in sentences, as the terminal and the report have it."""
    rounds = _rounds(run)
    steps = rounds[-1].last if rounds else run.config.schedule.steps
    ended = (f"the rounds end with round {len(rounds)}: {each.stopped}" for each in rounds if each.stopped is not None)
    return [*summary(_metrics(run), steps, best_of(run.config)), *ended]


def write_run_report(run: Run, arguments: Sequence[str], began: float) -> Path:
    """Write report.html, whose path is returned, and results.json into the run's folder, in one process.

    began: `time.monotonic()` of the start. Raises what reading the runs of evaluations and writing raise.
    """
    folder, rows, said = Path(run.config.directory), _metrics(run), result_lines(run)
    made_by = {
        "command": " ".join([f"python -m sysdpo_jax.cli.{'online' if is_online(run.config) else 'train'}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds of this start": round(time.monotonic() - began, 1),
    }
    rounds = _rounds(run)
    results = _results(rows, said, best_of(run.config)) | {
        "data": json.loads((folder / DATA).read_text(encoding="utf-8")),
        "made_by": made_by,
    }
    if is_online(run.config):
        results |= {"rounds": [each._asdict() for each in rounds]}
        results["data"]["kept"] = sum(each.pairs - each.earlier for each in rounds)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    report = Report(
        title=f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system",
        headline=tuple(f"{text[0].upper()}{text[1:]}." for text in said),
        description=DESCRIPTION.format(kind=run.config.objective.kind.capitalize(), pairs=results["data"]["kept"])
        + (EVALUATION if evaluations(rows) else ""),
        tables=(*_table(rows, best_of(run.config), rounds), *_rounds_table(rounds)),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        runs=tuple(compared_runs(run, _compared(rows, best_of(run.config)))),
        system=run.system,
        configuration={name: value for name, value in asdict(run.config).items() if name != "directory"},
        made_by=made_by,
    )
    write_report(folder / "report.html", report)
    return folder / "report.html"


def _metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(Path(run.config.directory) / "metrics.jsonl")


def _rounds(run: Run) -> tuple[RoundSummary, ...]:
    """Those of an online run that are done."""
    return round_store(run).summaries() if is_online(run.config) else ()


def _results(rows: Sequence[Mapping[str, Any]], said: Sequence[str], best: Best) -> dict[str, Any]:
    """The figures of the report, to be read by programs; docs/metrics.md has their names."""
    return {
        "summary": list(said),
        "final": final_figures(rows, best),
        "evaluations": evaluations(rows),
        "best_step": best_evaluation(rows, best),
        "training": _last_figures(rows),
        "warnings": list(run_warnings(rows)),
    }


def _last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [row for row in rows if "loss" in row]
    return {name: trained[-1].get(name) for name in ("step", *ENDED)} if trained else {}


def _compared(rows: Sequence[Mapping[str, Any]], best: Best) -> dict[str, int]:
    """{name: step} of the evaluations that runs are shown of."""
    final = final_figures(rows, best)
    after = {f"after {final['step']:.0f} steps": int(final["step"])} if final else {}
    return {"before training": 0, **after} if evaluations(rows) else {}


def _table(rows: Sequence[Mapping[str, Any]], by: Best, rounds: Sequence[RoundSummary]) -> Iterator[Table]:
    """The evaluations; the win rate first, for a telephone is narrow."""
    made, best = evaluations(rows), best_evaluation(rows, by)
    ends = {each.last: f", end of round {number}" for number, each in enumerate(rounds, 1)}
    columns = (Column("win rate", digits=1, percent=True), Column("score"), Column("change"))
    if made:
        shown = tuple(
            Row(
                f"step {row['step']}" + ends.get(row["step"], "") + (", best" if row["step"] == best else ""),
                tuple(_values(row)),
            )
            for row in made
        )
        yield Table("Evaluations on held-out prompts, with 95% intervals", columns, shown, label="after")


def _rounds_table(rounds: Sequence[RoundSummary]) -> Iterator[Table]:
    """What each round was made of."""
    if rounds:
        counts = (Column(name, digits=0, best=None) for name in ("pairs", "of earlier rounds"))
        shown = tuple(
            Row(
                f"round {number}, steps {each.first} to {each.last}",
                (Ranged(each.score, None, each.runs), each.pairs, each.earlier),
            )
            for number, each in enumerate(rounds, 1)
        )
        columns = (Column("score of its runs"), *counts)
        yield Table("Rounds", columns, shown, label="round")


def _values(row: Mapping[str, Any]) -> Iterator[Ranged | None]:
    for name in ("eval/win_rate", "eval/score", "eval/score_difference"):
        # Before training the system is compared with itself.
        known = row["step"] > 0 or name == "eval/score"
        yield Ranged(row[name], interval_of(row, name), int(row["eval/runs"])) if known else None
