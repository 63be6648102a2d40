"""Held-out figures of the DSPy program before and after its alignment, as docs/programs/dspy.json has them.

example:
  python -m experiments.programs.dspy_figures before after figures.json --control greedy

before, after: folders of `experiments.programs.dspy_run --questions held_out`, with runs of the same questions. Errors
are clustered by element, of which there are two questions; differences are paired by question.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from experiments.programs.elements import KINDS
from experiments.programs.estimates import compared
from sysdpo_jax.evaluation import clustered_mean, paired_difference
from sysdpo_jax.io import write_json

FIGURES = ("f1", "exact", "right", "found")
# Of so many runs the file has what was said, taken at equal distances.
EXAMPLES, SAID = 12, ("query", "answer", "f1")
Rows = Sequence[dict[str, Any]]


def figures(before: Rows, after: Rows) -> dict[str, Any]:
    """Each figure before, after and their difference, of all questions and of each kind. Raises `ValueError` where the
    runs are not of the same questions."""
    first, second = sorted(before, key=_question), sorted(after, key=_question)
    if [_question(row) for row in first] != [_question(row) for row in second]:
        raise ValueError("the two folders have runs of different questions: give both the same --number and --samples")
    kinds = {text: [place for place, row in enumerate(first) if _is_of(row, text)] for text, _ in KINDS}
    everything = range(len(first))
    return {
        "questions": len({row["question"] for row in first}),
        "elements": len({row["element"] for row in first}),
        "runs": len(first),
        **{name: _compared(name, first, second, everything) for name in FIGURES},
        "words of an answer": _compared("words", _with_words(first), _with_words(second), everything),
        "f1 by kind of question": {text: _compared("f1", first, second, rows) for text, rows in kinds.items() if rows},
        "examples": [_example(first[place], second[place]) for place in everything[:: len(first) // EXAMPLES or 1]],
    }


def beside(control: Rows, after: Rows) -> dict[str, Any]:
    """Each figure of a control, one run a question, and how much the runs after differ from it."""
    known = {_question(row): row for row in control}
    before = [known[_question(row)] for row in after]
    return {
        name: {
            "control": asdict(clustered_mean(_column(control, name), _column(control, "element"))),
            "difference": asdict(
                paired_difference(_column(after, name), _column(before, name), _column(after, "element"))
            ),
        }
        for name in FIGURES
    }


def _compared(name: str, first: Rows, second: Rows, places: Sequence[int]) -> dict[str, Any]:
    first, second = ([side[place] for place in places] for side in (first, second))
    return compared(_column(first, name), _column(second, name), _column(first, "element"))


def _column(rows: Rows, name: str) -> Any:
    """Of numbers or of names."""
    return np.array([row[name] if isinstance(row[name], str) else float(row[name]) for row in rows])


def _example(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    said = {when: {name: row[name] for name in SAID} for when, row in (("before", before), ("after", after))}
    return {"question": before["question"], "wanted": before["wanted"], **said}


def _question(row: dict[str, Any]) -> str:
    return str(row["question"])


def _is_of(row: dict[str, Any], text: str) -> bool:
    return row["question"].startswith(text.split("{")[0])


def _with_words(rows: Rows) -> Rows:
    return [row | {"words": len(row["answer"].split())} for row in rows]


def _read(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write the file, and print the figures of all questions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--control", type=Path, help="runs before at another temperature, one of each question")
    parser.add_argument("--note", action="append", default=[], metavar="NAME=TEXT", help="what the file says besides")
    given = parser.parse_args()
    after = _read(given.after)
    made = figures(_read(given.before), after)
    if given.control is not None:
        made["before at temperature 0"] = beside(_read(given.control), after)
    about = {"date": date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    about |= dict(note.split("=", 1) for note in given.note)
    write_json(given.output, about | {"held_out": made})
    for name in (*FIGURES, "words of an answer"):
        told = (f"{when} {each['value']:.3f} ± {each['standard_error']:.3f}" for when, each in made[name].items())
        print(name, *told)


if __name__ == "__main__":
    main()
