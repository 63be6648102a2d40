"""The report of a training run and results.json: what changed since the first evaluation, and how training went."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sysdpo_jax.evaluation import Estimate
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.report.learning import run_figures, run_warnings
from sysdpo_jax.report.outcome import (
    BEST,
    Best,
    best_evaluation,
    evaluations,
    final_figures,
    interval_of,
    last_figures,
    summary,
)
from sysdpo_jax.report.page import Report
from sysdpo_jax.report.samples import ComparedRuns
from sysdpo_jax.report.tables import Column, Row, Table

Rows = Sequence[Mapping[str, Any]]

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


def run_summary(rows: Rows, steps: int, best: Best = BEST, rounds: Rows = ()) -> Iterator[str]:
    """The result in sentences, as `run_results` takes its arguments."""
    yield from summary(rows, rounds[-1]["last"] if rounds else steps, best)
    for number, each in enumerate(rounds, 1):
        if each["stopped"] is not None:
            yield f"the rounds end with round {number}: {each['stopped']}"


def run_results(rows: Rows, steps: int, best: Best = BEST, rounds: Rows = ()) -> dict[str, Any]:
    """The figures of the report, to be read by programs; docs/metrics.md has their names.

    Args:
        rows: The metrics of the run.
        steps: Of the training.
        best: By which figure an evaluation is the best.
        rounds: Those of an online run that are done, as results.json has them.
    """
    return {
        "summary": list(run_summary(rows, steps, best, rounds)),
        "final": final_figures(rows, best),
        "evaluations": evaluations(rows),
        "best_step": best_evaluation(rows, best),
        "training": last_figures(rows),
        "warnings": list(run_warnings(rows)),
    }


def run_report(
    title: str,
    rows: Rows,
    results: Mapping[str, Any],
    system: CompoundSystem,
    configuration: Mapping[str, Any],
    runs: tuple[ComparedRuns, ...],
    best: Best = BEST,
) -> Report:
    """The report of a run whose metrics are `rows`.

    results: as `run_results` has them, with "data", whose "kept" is the number of preferences, "made_by", and of online
    rounds "rounds". best: by which figure an evaluation is the best.
    """
    rounds = results.get("rounds", ())
    kind = configuration["objective"]["kind"].capitalize()
    description = DESCRIPTION.format(kind=kind, pairs=results["data"]["kept"])
    return Report(
        title=title,
        headline=tuple(f"{text[0].upper()}{text[1:]}." for text in results["summary"]),
        description=description + (EVALUATION if evaluations(rows) else ""),
        tables=(*_table(rows, best, rounds), *_rounds_table(rounds)),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        runs=runs,
        system=system,
        configuration=configuration,
        made_by=results["made_by"],
    )


def compared_steps(rows: Rows, best: Best = BEST) -> dict[str, int]:
    """{name: step} of the evaluations that runs are shown of."""
    final = final_figures(rows, best)
    after = {f"after {final['step']:.0f} steps": int(final["step"])} if final else {}
    return {"before training": 0, **after} if evaluations(rows) else {}


def _table(rows: Rows, by: Best, rounds: Rows) -> Iterator[Table]:
    """The evaluations; the win rate first, for a telephone is narrow."""
    made, best = evaluations(rows), best_evaluation(rows, by)
    ends = {each["last"]: f", end of round {number}" for number, each in enumerate(rounds, 1)}
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


def _rounds_table(rounds: Rows) -> Iterator[Table]:
    """What each round was made of."""
    if rounds:
        counts = (Column(name, digits=0, best=None) for name in ("pairs", "of earlier rounds"))
        shown = tuple(
            Row(
                f"round {number}, steps {each['first']} to {each['last']}",
                (Estimate(each["score"], None, each["runs"]), each["pairs"], each["earlier"]),
            )
            for number, each in enumerate(rounds, 1)
        )
        yield Table("Rounds", (Column("score of its runs"), *counts), shown, label="round")


def _values(row: Mapping[str, Any]) -> Iterator[Estimate | None]:
    for name in ("eval/win_rate", "eval/score", "eval/score_difference"):
        # Before training the system is compared with itself.
        known = row["step"] > 0 or name == "eval/score"
        yield Estimate(row[name], None, int(row["eval/runs"]), interval_of(row, name)) if known else None
