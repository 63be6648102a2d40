"""The small size: two tiny decoders, trained from scratch on arithmetic over facts, whose faults only both can fix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.collaboration.arithmetic import OPERATIONS, Question, World, right_answer
from experiments.collaboration.task import ANSWER, DRAFT, DRAFTER, REFINER, SHARED, AlignConfig, Split
from experiments.common.fit import FitConfig, fit
from experiments.common.phases import Phases
from experiments.common.words import word_tokenizer
from sysdpo_jax import BeamSearch, CompoundSystem, LanguageModel, Node
from sysdpo_jax.keys import named_key
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.training import Report
from sysdpo_jax.typing import Features, Params, Record

INPUTS = ("facts", "names", "operation")
# Two values and the end; an answer has room to spare, so that one model can do both.
NEW_TOKENS = 3


@dataclass(frozen=True)
class SmallTask:
    """width, layers: of each decoder. questions: how many of each split."""

    world: World = World()
    width: int = 64
    layers: int = 2
    search: BeamSearch = BeamSearch()
    pretraining: FitConfig = FitConfig(steps=1500, learning_rate=3e-3, batch_size=128, examples=65536)
    train_questions: int = 512
    validation_questions: int = 256
    test_questions: int = 512
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(
            beta=0.5,
            sft=0.3,
            drafter_rate=2e-3,
            refiner_rate=2e-3,
            steps=400,
            batch_size=64,
            samples=16,
            group=4,
            num_intermediates=8,
            every=1,
            epochs=20,
        )
    )

    def system(self, shared: bool) -> CompoundSystem:
        model = self._model()
        return CompoundSystem(
            inputs=INPUTS,
            nodes=(
                Node(DRAFT, model, INPUTS, params=SHARED if shared else DRAFTER),
                Node(ANSWER, model, ("operation", DRAFT), params=SHARED if shared else REFINER),
            ),
        )

    def initial(self, shared: bool, seed: int, phases: Phases) -> Params:
        """Trained from scratch on data with faults; one model for both nodes learns from both kinds."""
        model, key = self._model(), jax.random.key(seed)
        data = {DRAFTER: self._drafts, REFINER: self._replies, SHARED: self._both}

        def make(name: str, report: Report) -> Params:
            return fit(model, data[name](seed), self.pretraining, named_key(key, name), report)

        names = (SHARED,) if shared else (DRAFTER, REFINER)
        return {name: phases.params(f"pretrain_{name}", self.pretraining.steps, partial(make, name)) for name in names}

    def questions(self, split: Split, seed: int) -> list[dict[str, Any]]:
        return [question.inputs for question in self._split(seed)[split]]

    def score(self, record: Record) -> float:
        return float(record[ANSWER] == str(right_answer(record)))

    def _model(self) -> LanguageModel:
        words, prompt = word_tokenizer(self.world.vocabulary), self.world.facts + len(INPUTS)
        decoder = DecoderConfig(
            vocab_size=len(words),
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=prompt + NEW_TOKENS,
            tie_word_embeddings=True,
        )
        return LanguageModel(Decoder(decoder), words, prompt, NEW_TOKENS, prompt=_joined, search=self.search)

    def _split(self, seed: int) -> dict[str, list[Question]]:
        sizes = {"test": self.test_questions, "validation": self.validation_questions, "train": self.train_questions}
        return self.world.split(sizes, seed)

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
