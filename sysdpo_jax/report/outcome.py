"""What a run came to, in numbers for results.json and in sentences for the terminal and the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sysdpo_jax.evaluation import Interval, too_few

# Which evaluation is the best.
Best = tuple[str, Literal["min", "max"]]
BEST: tuple[str, Literal["max"]] = ("eval/win_rate", "max")
EVALUATED = "eval/"
# Of these the last values say how training ended.
ENDED = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
Row = Mapping[str, Any]
Figures = Mapping[str, int | float]


def evaluations(rows: Sequence[Row]) -> list[Row]:
    """Those of a run's rows that are evaluations."""
    return [row for row in rows if row.get(BEST[0]) is not None]


def best_evaluation(rows: Sequence[Row], best: Best = BEST) -> int | None:
    """The step of the best evaluation, of equal ones the last, as of checkpoints; None where none is.

    best: by which figure. It is 0 where every later one is worse than the system before training.
    """
    metric, mode = best
    sign = 1 if mode == "max" else -1
    graded = [(sign * row[metric], row["step"]) for row in evaluations(rows)]
    return max(graded)[1] if graded else None


def final_figures(rows: Sequence[Row], best: Best = BEST) -> dict[str, int | float]:
    """The figures of the best evaluation, of the last one where none is better than before training.

    "step", and as in the rows without "eval/"; "score_before" is of the same pairs of runs as "score". Empty where
    there is no evaluation but that before training, or none at all.
    """
    made, step = evaluations(rows), best_evaluation(rows, best)
    if not made or made[-1]["step"] == 0:
        return {}
    row = next(row for row in made if row["step"] == (step or made[-1]["step"]))
    figures = {name.removeprefix(EVALUATED): value for name, value in row.items() if name.startswith(EVALUATED)}
    return {"step": row["step"], **figures, "score_before": figures["score"] - figures["score_difference"]}


def last_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """How training ended: "step" and the figures of its last row; empty where there is none."""
    trained = [row for row in rows if "loss" in row]
    return {name: trained[-1].get(name) for name in ("step", *ENDED)} if trained else {}


def interval_of(figures: Figures, name: str) -> Interval | None:
    """The interval that was logged beside a figure, None for none."""
    ends = figures.get(f"{name}/low"), figures.get(f"{name}/high")
    return None if ends[0] is None or ends[1] is None else Interval(ends[0], ends[1])


def summary(rows: Sequence[Row], steps: int, best: Best = BEST) -> Iterator[str]:
    """The result in sentences, of which there are none without an evaluation. Brackets hold 95% intervals.

    steps: of the whole training, which may have been stopped before.
    """
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


def _plain(row: Row) -> dict[str, int | float]:
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


def _which(made: Sequence[Row], step: int, best: Best) -> str:
    later = sum(row["step"] > 0 for row in made)
    if best_evaluation(made, best) == 0:
        return f"at step {step}, the last: no evaluation was better than the system before training"
    return f"best of {later} evaluations at step {step}" if later > 1 else f"at step {step}"
