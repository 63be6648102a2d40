"""What a training run came to: in numbers for results.json, in sentences for the terminal, and as a report."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sysdpo_jax.evaluation import Estimate, Interval, too_few
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.report.curves import Rows, run_figures, run_warnings
from sysdpo_jax.report.page import Report
from sysdpo_jax.report.tables import Column, ComparedRuns, Row, Table

# Which evaluation is the best.
Best = tuple[str, Literal["min", "max"]]
BEST: tuple[str, Literal["max"]] = ("eval/win_rate", "max")
EVALUATED = "eval/"
# Of these the last values say how training ended.
ENDED = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
Figures = Mapping[str, int | float]

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
ROUNDS = """
Thin vertical lines in the charts are where the rounds begin.
"""


def evaluations(rows: Rows) -> list[Mapping[str, Any]]:
    """Those of a run's rows that are evaluations."""
    return [row for row in rows if row.get(BEST[0]) is not None]


def best_evaluation(rows: Rows, best: Best = BEST) -> int | None:
    """The step of the best evaluation, of equal ones the last, as of checkpoints; None where none is.

    best: by which figure. It is 0 where every later one is worse than the system before training.
    """
    metric, mode = best
    sign = 1 if mode == "max" else -1
    graded = [(sign * row[metric], row["step"]) for row in evaluations(rows)]
    return max(graded)[1] if graded else None


def final_figures(rows: Rows, best: Best = BEST) -> dict[str, int | float]:
    """The figures of the best evaluation, of the last one where none is better than before training.

    "step", and as in the rows without "eval/"; "score_before" is of the same pairs of runs as "score". Empty where
    there is no evaluation but that before training, or none at all.
    """
    made, step = evaluations(rows), best_evaluation(rows, best)
    if not made or made[-1]["step"] == 0:
        return {}
    row = next(row for row in made if row["step"] == (step or made[-1]["step"]))
    figures = _plain({name: value for name, value in row.items() if name.startswith(EVALUATED)})
    return {"step": row["step"], **figures, "score_before": figures["score"] - figures["score_difference"]}


def interval_of(figures: Figures, name: str) -> Interval | None:
    """The interval that was logged beside a figure, None for none."""
    ends = figures.get(f"{name}/low"), figures.get(f"{name}/high")
    return None if ends[0] is None or ends[1] is None else Interval(ends[0], ends[1])


def summary(rows: Rows, steps: int, best: Best = BEST, rounds: Rows = ()) -> Iterator[str]:
    """The result in sentences, of which there are none without an evaluation. Brackets hold 95% intervals.

    steps: of the whole training, which may have been stopped before. rounds: as of `run_results`.
    """
    steps = rounds[-1]["last"] if rounds else steps
    made, figures = evaluations(rows), final_figures(rows, best)
    if made and not figures:
        yield (
            f"score {_ranged(_plain(made[-1]), 'score')} before training over {over(_plain(made[-1]))}; no "
            "evaluation since, so that there is nothing to compare it with"
        )
    if figures:
        yield f"win rate {_win_rate(figures)} over {over(figures)}, {_which(made, int(figures['step']), best)}"
        yield (
            f"score {figures['score_before']:.4g} before, {figures['score']:.4g} after: difference "
            f"{_ranged(figures, 'score_difference', '+')}"
        )
    if made:
        few = too_few(int(_plain(made[-1])["prompts"]))
        yield from (few,) if few else ()
        if made[-1]["step"] < steps:
            yield f"the last evaluation was at step {made[-1]['step']} of {steps}"
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
    trained = [row for row in rows if "loss" in row]
    return {
        "summary": list(summary(rows, steps, best, rounds)),
        "final": final_figures(rows, best),
        "evaluations": evaluations(rows),
        "best_step": best_evaluation(rows, best),
        # How training ended.
        "training": {name: trained[-1].get(name) for name in ("step", *ENDED)} if trained else {},
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
    rounds "rounds". configuration: of the run, with its "directory". best: by which figure an evaluation is the best.
    """
    rounds, folder = results.get("rounds", ()), Path(configuration["directory"])
    words = [word.rpartition("=") for word in shlex.split(results["made_by"]["command"])]
    command = shlex.join(name + sign + portable(value, folder) for name, sign, value in words)
    kind = configuration["objective"]["kind"].capitalize()
    description = DESCRIPTION.format(kind=kind, pairs=results["data"]["kept"])
    return Report(
        title=title,
        headline=tuple(f"{text[0].upper()}{text[1:]}." for text in results["summary"]),
        description=description + (EVALUATION if evaluations(rows) else "") + (ROUNDS if rounds else ""),
        tables=(*_table(rows, best, rounds), *_rounds_table(rounds)),
        figures=run_figures(rows, [each["first"] for each in rounds]),
        warnings=run_warnings(rows),
        runs=runs,
        system=system,
        configuration={name: portable(v, folder) for name, v in configuration.items() if name != "directory"},
        made_by={**results["made_by"], "command": command},
    )


def portable(value: Any, folder: Path) -> Any:
    """A value, or a list or a mapping of values, without the places of this machine, which say nothing to a reader.

    What lies beside the run's folder is named from there, of another absolute path its last name alone.
    """
    if isinstance(value, Mapping):
        return {name: portable(item, folder) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(portable(item, folder) for item in value)
    path = Path(value) if isinstance(value, str) else Path()
    # A word such as "/think" is no path.
    if not path.is_absolute() or (len(path.parts) < 3 and not path.suffix):
        return value
    beside = folder.absolute().parent
    return str(path.relative_to(beside)) if path.is_relative_to(beside) else path.name


def compared_steps(rows: Rows, best: Best = BEST) -> dict[str, int]:
    """{name: step} of the evaluations that runs are shown of."""
    final = final_figures(rows, best)
    after = {f"after {final['step']:.0f} steps": int(final["step"])} if final else {}
    return {"before training": 0, **after} if evaluations(rows) else {}


def _plain(row: Mapping[str, Any]) -> dict[str, int | float]:
    return {name.removeprefix(EVALUATED): value for name, value in row.items()}


def _win_rate(figures: Figures) -> str:
    ends = interval_of(figures, "win_rate")
    text = f"{100 * figures['win_rate']:.1f}%"
    if ends is None:
        return text
    chance = ", which chance alone could give," if ends.low <= 0.5 <= ends.high else ""
    return f"{text} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]{chance}"


def _ranged(figures: Figures, name: str, sign: str = "-") -> str:
    ends = interval_of(figures, name)
    text = f"{figures[name]:{sign}.4g}"
    if ends is None:
        return text
    if ends.low == ends.high:
        return f"{text}, the same for every prompt"
    return f"{text} [{ends.low:{sign}.3g}, {ends.high:{sign}.3g}]"


def over(figures: Figures) -> str:
    """What figures are of, in words: "24 prompts x 2 samples"."""
    samples = figures["runs"] / figures["prompts"]
    prompts = f"{figures['prompts']:.0f} prompt{'' if figures['prompts'] == 1 else 's'}"
    if not figures["unscored"]:
        return f"{prompts} x {samples:.0f} sample{'' if samples == 1 else 's'}"
    return f"{prompts}, {figures['runs']:.0f} runs ({figures['unscored']:.0f} left out, which have no score)"


def _which(made: Rows, step: int, best: Best) -> str:
    later = sum(row["step"] > 0 for row in made)
    if best_evaluation(made, best) == 0:
        return f"at step {step}, the last: no evaluation was better than the system before training"
    return f"best of {later} evaluations at step {step}" if later > 1 else f"at step {step}"


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
