"""What people answered, kept at once, and the preferences that it makes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sysdpo_jax.annotation.comparisons import Comparison
from sysdpo_jax.data.annotations import Answer
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.preferences import too_few, win_rate
from sysdpo_jax.io import write_json_lines
from sysdpo_jax.runs.runs_file import Line, Outcomes, moved


class Judgement(NamedTuple):
    """What somebody said of a comparison."""

    comparison: Comparison
    answer: Answer


class StaleError(Exception):
    """An answer is of a pair that is not asked now: another window has answered it."""


class Answers:
    """The answers of one person, in a file beside the preferences that they make: both are on disk after each.

    Of a pair the file's last line holds; one whose answer is null was taken back. Pairs are asked in their order, so
    that the answer to take back is that of the pair before.

    Args:
        output: Of the preferences. The answers are `<output>.answers.jsonl`.
        comparisons: In the order of asking.
        about: What the answers are of, see `Outcomes`, and the "annotator".

    Raises:
        ConfigError: The output is of other answers, or of none.
    """

    def __init__(self, output: Path, comparisons: Sequence[Comparison], about: Mapping[str, str]):
        self._output, self._comparisons, self._annotator = output, comparisons, about["annotator"]
        self._file = Outcomes(answers_of(output), about)
        if self._file.made:
            self._write()
        elif output.exists():
            raise ConfigError(f"{output} exists, and is not made of answers: name another output")

    @property
    def judgements(self) -> list[Judgement]:
        """Of the pairs that are answered, in their order."""
        found = ((each, self._file.made.get(each.id, {}).get("answer")) for each in self._comparisons)
        return [Judgement(each, answer) for each, answer in found if answer is not None]

    @property
    def place(self) -> int:
        """Of the pair that is asked now; of none, the number of all."""
        made = self._file.made
        unanswered = (n for n, each in enumerate(self._comparisons) if made.get(each.id, {}).get("answer") is None)
        return next(unanswered, len(self._comparisons))

    def answer(self, asked: str, answer: Answer, seconds: float) -> None:
        """Keep the answer to the pair of that id. Raises `StaleError` unless it is the one that is asked now."""
        place = self.place
        if place == len(self._comparisons) or self._comparisons[place].id != asked:
            raise StaleError
        self._keep(self._comparisons[place], {"answer": answer, "seconds": round(seconds, 1)})

    def take_back(self, asked: str) -> None:
        """Ask the pair before again. asked: as `answer`, "" after the last one. Raises `StaleError` likewise."""
        place = self.place
        if asked != (self._comparisons[place].id if place < len(self._comparisons) else ""):
            raise StaleError
        if place > 0:
            self._keep(self._comparisons[place - 1], {"answer": None, "seconds": None})

    def _keep(self, of: Comparison, said: Mapping[str, Any]) -> None:
        names = {"left": of.left.name, "right": of.right.name, "annotator": self._annotator}
        self._file.add([{"id": of.id, **names, **said}])
        self._write()

    def _write(self) -> None:
        write_json_lines(self._output, preferences(self.judgements, self._output))


def answers_of(output: Path) -> Path:
    """Where the answers lie that make the preferences at `output`."""
    return output.with_name(f"{output.name}.answers.jsonl")


def preferences(judgements: Iterable[Judgement], output: Path) -> list[Line]:
    """The lines that `sysdpo train` reads: whole runs with all intermediate values, of what is neither tie nor skip."""
    lines = []
    for comparison, answer in judgements:
        if answer in ("left", "right"):
            sides = (comparison.left, comparison.right)
            chosen, rejected = (
                moved(side.run, side.path, output) for side in (sides if answer == "left" else sides[::-1])
            )
            lines.append({"inputs": chosen["inputs"], "chosen": chosen["outputs"], "rejected": rejected["outputs"]})
    return lines


def summary(judgements: Sequence[Judgement], paths: Sequence[Path], output: Path) -> str:
    """The counts in words, of two files the share of wins of the first one, and what to do with the preferences."""
    counts = Counter(answer for _, answer in judgements)
    made = counts["left"] + counts["right"]
    lines = [f"{output}: {made} preferences, {counts['tie']} ties, {counts['skip']} skipped"]
    if made:
        lines[0] += f" (left was better in {counts['left']} of {made})"
    if len(paths) == 2:
        lines += _wins(judgements, paths)
    if made:
        lines.append(f"next: sysdpo train RECIPE_OR_FILE --data.source {output}")
    return "\n".join(lines)


def _wins(judgements: Sequence[Judgement], paths: Sequence[Path]) -> list[str]:
    said = [each for each in judgements if each.answer != "skip"]
    if not said:
        return []
    names = "{} is preferred to {}".format(*paths)
    better = np.array([_first(each) for each in said])
    prompts = [each.comparison.left.prompt for each in said]
    few = too_few(len(set(prompts)))
    if len(set(prompts)) == 1:
        return [f"{names} in {better.mean():.0%} of {len(said)} pairs, a tie counted half; {few}"]
    share = win_rate(better, 1 - better, np.array(prompts))
    assert share.interval is not None
    interval = f"95% interval {share.interval.low:.0%} to {share.interval.high:.0%}"
    return [
        f"{names} in {share.value:.0%} of {share.n} pairs ({interval}), a tie counted half"
        + (f"; {few}" if few else "")
    ]


def _first(judgement: Judgement) -> float:
    """1 where the run of the first file is better, 0 where that of the second is, and 0.5 for a tie."""
    if judgement.answer == "tie":
        return 0.5
    side = judgement.comparison.left if judgement.answer == "left" else judgement.comparison.right
    return float(side.place == 0)
