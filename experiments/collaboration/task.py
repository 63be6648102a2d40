"""What a size of the experiment consists of: its models, its questions, the checker, and how it is aligned.

Every size is a system of two nodes, "draft" and "answer", both language models. `initial` gives the prompted system.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sysdpo_jax as sj
from experiments.common.command import read_table
from experiments.common.models import adam_with_warmup
from sysdpo_jax.training import SystemOptimizer

# Names of the nodes, and of their parameters: two trees, or one that both nodes share.
DRAFT, ANSWER = "draft", "answer"
DRAFTER, REFINER, SHARED = "drafter", "refiner", "shared"


@dataclass(frozen=True)
class AlignConfig:
    """Preference pairs and the optimisation on them, the same for every method.

    samples, group, min_margin: runs of each training question; the best of a group of them against its worst, when
    their scores differ by this much. beta, sft: of the objective; sft is for each trained node.
    epochs: most passes over the pairs; fewer pairs mean fewer steps.
    num_intermediates, every, chunk_size: of SysDPO-Sampling: the drafts of a search, the steps until the next search,
    and how many drafts are evaluated at once.
    drafter_rate, refiner_rate: peaks of Adam's rate; with shared weights the drafter's counts.
    trainable: regex of the leaves that training changes, the only ones a run stores; the rest is as `initial` gives it.
    """

    beta: float
    sft: float
    drafter_rate: float
    refiner_rate: float
    steps: int
    batch_size: int
    samples: int
    group: int
    num_intermediates: int
    every: int
    epochs: int = 12
    min_margin: float = 0.0
    chunk_size: int | None = None
    trainable: str = ".*"

    def __post_init__(self) -> None:
        if self.samples % self.group:
            raise ValueError(f"align.samples {self.samples} must be a multiple of align.group {self.group}")


ALIGN = read_table(Path(__file__).with_name("settings.yaml"), "align", AlignConfig)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A size of the experiment, whose fields identify a run folder. questions: how many of each split.

    Beside these fields it has `system(shared)`, inputs -> draft -> answer, whose inputs are strings and whose params
    keys are those of `keys_of`; `initial(shared, seed, phases)`, the prompted system's parameters, whose long making is
    a phase; `questions(split, seed)`, input records of which none is in two splits, nor twice in one; and
    `score(record)`, in [0, 1] and 1 exactly when the answer is right, which never reads the draft.
    """

    search: sj.BeamSearch = sj.BeamSearch()
    train_questions: int
    validation_questions: int
    test_questions: int
    align: AlignConfig

    @property
    def sizes(self) -> dict[str, int]:
        return {"test": self.test_questions, "validation": self.validation_questions, "train": self.train_questions}


def keys_of(shared: bool) -> tuple[str, str]:
    """The keys of the drafter's and of the refiner's parameters, one where they share them."""
    return (SHARED, SHARED) if shared else (DRAFTER, REFINER)


@dataclass(frozen=True)
class Alignment:
    """nodes: those that are trained. recorded: whether pairs hold the drafts (SysDPO-Direct), else SysDPO-Sampling."""

    nodes: tuple[str, ...]
    recorded: bool


BOTH = (DRAFT, ANSWER)
ALIGNMENTS = {
    "draft_recorded": Alignment((DRAFT,), True),
    "answer_recorded": Alignment((ANSWER,), True),
    "first_only": Alignment((DRAFT,), False),
    "second_only": Alignment((ANSWER,), False),
    "sysdpo_sampling": Alignment(BOTH, False),
    "sysdpo_direct": Alignment(BOTH, True),
}


def optimizer_of(system: sj.CompoundSystem, nodes: Sequence[str], config: AlignConfig, steps: int) -> SystemOptimizer:
    """Adam with warm-up and a cosine for the parameters of the nodes; the other parameters are frozen."""
    rates = {key: config.refiner_rate if key == REFINER else config.drafter_rate for key in system.param_keys}
    trained = {system.node(name).params_key for name in nodes}
    return sj.make_optimizer(
        {
            key: adam_with_warmup(rates[key], config.trainable, steps) if key in trained else sj.FROZEN
            for key in system.param_keys
        }
    )


def number_of_steps(pairs: Sequence[sj.PreferenceRecord], config: AlignConfig) -> int:
    """At most `epochs` passes over the pairs."""
    return min(config.steps, config.epochs * (len(pairs) // config.batch_size))
