"""The report of a training run and results.json: what changed since the first evaluation, and how training went."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sysdpo_jax.evaluation import Estimate
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.report.learning import run_figures, run_warnings
from sysdpo_jax.report.outcome import best_evaluation, evaluations, final_figures, interval_of, last_figures, summary
from sysdpo_jax.report.page import Report
from sysdpo_jax.report.samples import ComparedRuns
from sysdpo_jax.report.tables import Column, Row, Table

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


def run_results(rows: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """The figures of the report, to be read by programs; docs/metrics.md has their names. steps: of the training."""
    return {
        "summary": list(summary(rows, steps)),
        "final": final_figures(rows),
        "evaluations": evaluations(rows),
        "best_step": best_evaluation(rows),
        "training": last_figures(rows),
        "warnings": list(run_warnings(rows)),
    }


def run_report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    system: CompoundSystem,
    configuration: Mapping[str, Any],
    runs: tuple[ComparedRuns, ...],
) -> Report:
    """The report of a run whose metrics are `rows`.

    results: as `run_results` has them, with "data", whose "kept" is the number of preferences, and "made_by".
    """
    kind = configuration["objective"]["kind"].capitalize()
    description = DESCRIPTION.format(kind=kind, pairs=results["data"]["kept"])
    return Report(
        title=title,
        headline=tuple(f"{text[0].upper()}{text[1:]}." for text in results["summary"]),
        description=description + (EVALUATION if evaluations(rows) else ""),
        tables=tuple(_table(rows)),
        figures=run_figures(rows),
        warnings=run_warnings(rows),
        runs=runs,
        system=system,
        configuration=configuration,
        made_by=results["made_by"],
    )


def compared_steps(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
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


def _values(row: Mapping[str, Any]) -> Iterator[Estimate | None]:
    for name in ("eval/win_rate", "eval/score", "eval/score_difference"):
        # Before training the system is compared with itself.
        known = row["step"] > 0 or name == "eval/score"
        yield Estimate(row[name], None, int(row["eval/runs"]), interval_of(row, name)) if known else None
