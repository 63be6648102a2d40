"""What the DSPy program of docs/programs/dspy.md looks up and is asked, and how its answers are scored.

92 passages, one for each chemical element, two questions about each. Elements of odd numbers are for training, those of
even numbers are held out.
"""

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

with (Path(__file__).parents[2] / "sysdpo_jax/recipes/elements.csv").open(encoding="utf-8", newline="") as file:
    ELEMENTS = [*csv.DictReader(file)]
PASSAGE = "{name} is the element with the symbol {symbol}, the number {number} and the mass {mass}."
PASSAGES = [(text := PASSAGE.format(**row))[0].upper() + text[1:] for row in ELEMENTS]
# A question, and the column with its answer.
KINDS = (
    ("What is the symbol of {name}?", "symbol"),
    ("Which element has the number {number}?", "name"),
    ("What is the mass of {name}?", "mass"),
    ("Which element has the symbol {symbol}?", "name"),
    ("What is the number of {name}?", "number"),
)


@dataclass(frozen=True)
class Question:
    """A question about an element, what is right, and the passage that says it."""

    text: str
    wanted: str
    element: str
    passage: str


def questions(part: str) -> list[Question]:
    """Those for training, or those that are held out: two about each element, the kinds in turn."""
    made = []
    odd = int(part == "training")
    rows = [pair for pair in zip(ELEMENTS, PASSAGES, strict=True) if int(pair[0]["number"]) % 2 == odd]
    for place, (row, passage) in enumerate(rows):
        for turn in (2 * place, 2 * place + 1):
            text, column = KINDS[turn % len(KINDS)]
            made.append(Question(text.format(**row), row[column], row["name"], passage))
    return made


def words(text: str) -> list[str]:
    """Words and numbers in small letters."""
    return re.findall(r"\w+(?:\.\d+)?", text.lower())


_HELD = [Counter(words(passage)) for passage in PASSAGES]
_FOUND_IN = Counter(word for held in _HELD for word in held)


def retrieve(query: str, number: int) -> list[str]:
    """The passages that share the rarest words with the query: by the sum of their inverse document frequencies."""
    rarity = {word: math.log(len(PASSAGES) / _FOUND_IN[word]) for word in set(words(query)) if word in _FOUND_IN}
    scores = [sum(value for word, value in rarity.items() if word in held) for held in _HELD]
    return [PASSAGES[place] for place in sorted(range(len(scores)), key=lambda place: -scores[place])[:number]]


def f1(answer: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the words, as SQuAD scores answers (Rajpurkar et al., 2016)."""
    said, right = Counter(words(answer)), Counter(words(wanted))
    shared = (said & right).total()
    return 2 * shared / (said.total() + right.total())
