"""The small size: two tiny decoders, trained from scratch on arithmetic over facts, whose faults only both can fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.collaboration.arithmetic import OPERATIONS, Question, World, right_answer
from experiments.collaboration.task import ALIGN, ANSWER, DRAFT, DRAFTER, REFINER, SHARED, AlignConfig, Task, keys_of
from experiments.common.models import FitConfig, fit, small_writer
from experiments.common.phases import Phases
from sysdpo_jax import CompoundSystem, LanguageModel, Node
from sysdpo_jax.keys import named_key
from sysdpo_jax.training import Report
from sysdpo_jax.typing import Features, Params, Record

INPUTS = ("facts", "names", "operation")
# Two values and the end; an answer has room to spare, so that one model can do both.
NEW_TOKENS = 3


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
