"""The task of the SmolLM2 size: a sentence under six checkable instructions, of which each model sees a part.

The drafter is told two words that the sentence must hold, in that order; the refiner is told how the answer begins, and
sees the draft but not the words. Both prompts carry one worked example, without which a model of this size is lost.
"""

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

WORDS = (
    "apple", "baker", "bird", "boat", "book", "bread", "bridge", "cake", "cat", "cloud",
    "dog", "door", "farmer", "fire", "fish", "flower", "forest", "garden", "horse", "house",
    "king", "lamp", "letter", "moon", "mountain", "queen", "rain", "river", "road", "school",
    "ship", "snow", "soldier", "song", "storm", "stone", "table", "teacher", "train", "window",
)  # fmt: skip
OPENERS = ("Luckily", "Maybe", "Now", "Sadly", "Suddenly", "Today", "Tonight", "Yesterday")
LENGTHS = range(5, 11)

Message = dict[str, str]


def questions(sizes: Mapping[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """`{split: [{"words": "rain, king", "opener": "Now"}, ...]}` of the sizes asked for, by a permutation of the seed.

    No two questions have the same pair of words, in whatever order. Raises `ValueError` for more than there are.
    """
    pairs = list(combinations(WORDS, 2))
    if sum(sizes.values()) > len(pairs):
        raise ValueError(f"{sum(sizes.values())} questions asked for, but there are {len(pairs)}: lower the sizes")
    rng = np.random.default_rng((seed, 0))
    shuffled = iter(rng.permutation(len(pairs)))
    return {
        split: [
            {"words": ", ".join(rng.permutation(pairs[next(shuffled)])), "opener": str(rng.choice(OPENERS))}
            for _ in range(size)
        ]
        for split, size in sizes.items()
    }


def draft_prompt(words: str) -> list[Message]:
    """The drafter's messages."""
    return _chat("Write a short sentence with both words.", "hat, wind", "The hat flew in the wind.", words)


def answer_prompt(opener: str, draft: str) -> list[Message]:
    """The refiner's messages. The draft is put on one line."""
    example = "Soon: A hat flew away.", "Soon a hat flew away!"
    return _chat("Start with the word.", *example, f"{opener}: {' '.join(draft.split())}")


def checks(words: str, opener: str, answer: str) -> dict[str, bool]:
    """Which instructions the answer follows: `{name: whether}`. Words count whole, in small or capital letters."""
    first, second = words.split(", ")
    found, text = re.findall("[a-z]+", answer.lower()), answer.strip()
    return {
        "first word": first in found,
        "second word": second in found,
        "order": first in found and second in found[found.index(first) :],
        "opener": re.match(rf"{opener},? \w", text) is not None,
        "one exclamation": re.fullmatch(r"[^.!?:\n]+!", text) is not None,
        "length": len(found) in LENGTHS,
    }


def score(words: str, opener: str, answer: str) -> float:
    """The share of the checks that hold."""
    held = checks(words, opener, answer).values()
    return sum(held) / len(held)


def _chat(system: str, request: str, reply: str, last: str) -> list[Message]:
    turns = ("system", system), ("user", request), ("assistant", reply), ("user", last)
    return [{"role": role, "content": content} for role, content in turns]
