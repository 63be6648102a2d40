"""The small size: two tiny decoders, trained from scratch on arithmetic over facts, whose faults only both can fix.

"ana=3 cyd=7 bob=2 eve=5" / "cyd eve" / "minus": the draft says the two values, "7 5" or "seven five", the answer is
the number 2. Whoever writes the answer sees the draft and the operation, not the facts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.collaboration.task import ALIGN, ANSWER, DRAFT, DRAFTER, REFINER, SHARED, AlignConfig, Task, keys_of
from experiments.common.models import FitConfig, fit, small_writer
from experiments.common.phases import Phases
from sysdpo_jax import CompoundSystem, LanguageModel, Node
from sysdpo_jax.keys import named_key
from sysdpo_jax.training import Report
from sysdpo_jax.typing import Features, Params, Record

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda first, second: first + second,
    "minus": lambda first, second: first - second,
    "larger": max,
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INPUTS = ("facts", "names", "operation")
# Two values and the end; an answer has room to spare, so that one model can do both.
NEW_TOKENS = 3


@dataclass(frozen=True)
class Question:
    """Values of some names in the order in which they are said, the two names asked for, and the operation."""

    facts: tuple[tuple[str, int], ...]
    asked: tuple[str, str]
    operation: str

    @property
    def inputs(self) -> dict[str, str]:
        """The record that the system reads."""
        facts = " ".join(f"{name}={value}" for name, value in self.facts)
        return {"facts": facts, "names": " ".join(self.asked), "operation": self.operation}


@dataclass(frozen=True)
class Faults:
    """What is wrong with the training data.

    Drafts. forgetful: names which, asked for first, get their neighbour's value in the share `confused` of drafts (the
    others in the share `slips`). spelled: share of drafts in words. reversed_drafts: share with the second name first.
    Answers. reversed_answers: share of "minus" that takes the draft's first value from its second; the draft does not
    say whose values it holds, so what is right here depends on how drafts are written, and the reverse.
    misread: share of drafts in words whose answer is any number; one_off: share of "plus" that is too large by one.
    """

    forgetful: tuple[str, ...] = ("ana", "cyd", "eve")
    confused: float = 0.6
    slips: float = 0.1
    spelled: float = 0.5
    reversed_drafts: float = 0.35
    reversed_answers: float = 0.55
    misread: float = 0.6
    one_off: float = 0.5


@dataclass(frozen=True)
class World:
    """Names, how many values there are (0, 1, ..., at most 10 of them), and how many facts a question tells."""

    names: tuple[str, ...] = ("ana", "bob", "cyd", "dan", "eve", "fay")
    values: int = 10
    facts: int = 4
    faults: Faults = Faults()

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words of questions, drafts and answers."""
        facts = (f"{name}={value}" for name in self.names for value in range(self.values))
        return *facts, *self.names, *OPERATIONS, *map(str, self._numbers), *WORDS[: self.values]

    def question(self, rng: np.random.Generator) -> Question:
        """Facts, names and operation, all uniform."""
        names = rng.permutation(self.names)[: self.facts]
        facts = tuple((str(name), int(rng.integers(self.values))) for name in names)
        first, second = rng.choice(self.facts, 2, replace=False)
        return Question(facts, (facts[first][0], facts[second][0]), str(rng.choice(list(OPERATIONS))))

    def __post_init__(self) -> None:
        if not (2 <= self.facts <= len(self.names) and 1 <= self.values <= len(WORDS)):
            raise ValueError(
                f"World: facts {self.facts} must lie in 2..{len(self.names)} names, values {self.values} in "
                f"1..{len(WORDS)}"
            )

    def split(self, sizes: Mapping[str, int], seed: int) -> dict[str, list[Question]]:
        """Disjoint lists of distinct questions, `{split: that many}`. Raises `ValueError` for most of all there are."""
        orders = math.perm(len(self.names), self.facts) * self.values**self.facts
        if 2 * sum(sizes.values()) > orders * self.facts * (self.facts - 1) * len(OPERATIONS):
            raise ValueError(f"{sum(sizes.values())} questions are more than half of what the world has: lower them")
        rng = np.random.default_rng((seed, 0))
        made: dict[Question, None] = {}
        while len(made) < sum(sizes.values()):
            made[self.question(rng)] = None
        rest = iter(made)
        return {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}

    def draft(self, question: Question, rng: np.random.Generator) -> str:
        """A draft with the drafter's faults."""
        faults, names = self.faults, [name for name, _ in question.facts]
        first, second = (names.index(name) for name in question.asked)
        confused = faults.confused if names[first] in faults.forgetful else faults.slips
        if rng.random() < confused:
            first = (first + 1) % self.facts
        values = [question.facts[first][1], question.facts[second][1]]
        if rng.random() < faults.reversed_drafts:
            values.reverse()
        return written(values, rng.random() < faults.spelled)

    def any_draft(self, rng: np.random.Generator) -> str:
        """Two random values in a random notation."""
        return written([int(value) for value in rng.integers(self.values, size=2)], rng.random() < 0.5)

    def reply(self, operation: str, draft: str, rng: np.random.Generator) -> str:
        """The answer to a draft, with the refiner's faults."""
        words = draft.split()
        first, second = (WORDS.index(word) if word in WORDS else int(word) for word in words)
        if words[0] in WORDS and rng.random() < self.faults.misread:
            return str(rng.choice(self._numbers))
        if operation == "minus" and rng.random() < self.faults.reversed_answers:
            first, second = second, first
        wrong = operation == "plus" and rng.random() < self.faults.one_off
        return str(OPERATIONS[operation](first, second) + int(wrong))

    @property
    def _numbers(self) -> range:
        """The answers, the wrong ones included."""
        return range(1 - self.values, 2 * self.values)


def written(values: Sequence[int], spelled: bool) -> str:
    """A draft of these values, in words or in digits."""
    return " ".join(WORDS[value] if spelled else str(value) for value in values)


def right_answer(inputs: Mapping[str, str]) -> int:
    """Of a question's `inputs`."""
    values = dict(fact.split("=") for fact in inputs["facts"].split())
    return OPERATIONS[inputs["operation"]](*(int(values[name]) for name in inputs["names"].split()))


@dataclass(frozen=True, kw_only=True)
class SmallTask(Task):
    """width, layers: of each decoder."""

    world: World = World()
    width: int = 64
    layers: int = 2
    pretraining: FitConfig = FitConfig(steps=1500, learning_rate=3e-3, batch_size=128, examples=65536)
    train_questions: int = 512
    validation_questions: int = 256
    test_questions: int = 512
    align: AlignConfig = ALIGN["small"]

    def system(self, shared: bool) -> CompoundSystem:
        model, (drafter, refiner) = self._model(), keys_of(shared)
        nodes = Node(DRAFT, model, INPUTS, drafter), Node(ANSWER, model, ("operation", DRAFT), refiner)
        return CompoundSystem(INPUTS, nodes)

    def initial(self, shared: bool, seed: int, phases: Phases) -> Params:
        """Trained from scratch on data with faults; one model for both nodes learns from both kinds."""
        model, key = self._model(), jax.random.key(seed)
        data = {DRAFTER: self._drafts, REFINER: self._replies, SHARED: self._both}

        def make(name: str, report: Report) -> Params:
            return fit(model, data[name](seed), self.pretraining, named_key(key, name), report)

        return {
            name: phases.params(f"pretrain_{name}", self.pretraining.steps, partial(make, name))
            for name in dict.fromkeys(keys_of(shared))
        }

    def questions(self, split: str, seed: int) -> list[dict[str, Any]]:
        return [question.inputs for question in self._split(seed)[split]]

    def score(self, record: Record) -> float:
        return float(record[ANSWER] == str(right_answer(record)))

    def _model(self) -> LanguageModel:
        prompt = self.world.facts + len(INPUTS)
        settings: dict[str, Any] = {"prompt": _joined, "search": self.search}
        return small_writer(self.world.vocabulary, prompt, NEW_TOKENS, self.width, self.layers, **settings)

    def _split(self, seed: int) -> dict[str, list[Question]]:
        return self.world.split(self.sizes, seed)

    def _drafts(self, seed: int) -> Features:
        """Drafts for random questions, none of them held out."""
        rng, parts = np.random.default_rng((seed, 1)), self._split(seed)
        held_out = {*parts["test"], *parts["validation"]}
        made: list[Question] = []
        while len(made) < self.pretraining.examples:
            question = self.world.question(rng)
            if question not in held_out:
                made.append(question)
        drafts = [self.world.draft(question, rng) for question in made]
        return self._model().prepare(drafts, _columns([question.inputs for question in made]))

    def _replies(self, seed: int) -> Features:
        """Answers to drafts of any two values, in both notations alike."""
        rng = np.random.default_rng((seed, 2))
        drafts = [self.world.any_draft(rng) for _ in range(self.pretraining.examples)]
        operations = [str(name) for name in rng.choice(list(OPERATIONS), len(drafts))]
        answers = [self.world.reply(*row, rng) for row in zip(operations, drafts, strict=True)]
        return self._model().prepare(answers, {"operation": operations, DRAFT: drafts})

    def _both(self, seed: int) -> Features:
        return jax.tree.map(lambda *parts: np.concatenate(parts), self._drafts(seed), self._replies(seed))


def _joined(*parts: str) -> str:
    return " ".join(parts)


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    return {name: [record[name] for record in records] for name in records[0]}
