"""What a size of the experiment consists of: its two models, its questions, the checker and the settings of training.

Every size is a system of two nodes, "draft" and "answer", both language models. `initial` gives the prompted system.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from experiments.common.phases import Phases
from sysdpo_jax import CompoundSystem
from sysdpo_jax.typing import Params, Record

# Names of the nodes, and of their parameters: two trees, or one that both nodes share.
DRAFT, ANSWER = "draft", "answer"
DRAFTER, REFINER, SHARED = "drafter", "refiner", "shared"

Split = Literal["train", "validation", "test"]


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


class Task(Protocol):
    """One size of the experiment: a frozen dataclass, whose fields identify a run folder."""

    @property
    def align(self) -> AlignConfig: ...

    def system(self, shared: bool) -> CompoundSystem:
        """Inputs -> draft -> answer, with the temperatures and the search that the experiment uses.

        Inputs are strings. The params keys are DRAFTER and REFINER, or SHARED for both nodes.
        """
        ...

    def initial(self, shared: bool, seed: int, phases: Phases) -> Params:
        """The prompted system's `{params key: tree}`, the same for the same arguments.

        What takes long to make is a phase of `phases`, so that it is made once a run folder.
        """
        ...

    def questions(self, split: Split, seed: int) -> list[dict[str, Any]]:
        """Input records {input name: string}; no question is in two splits, nor twice in one."""
        ...

    def score(self, record: Record) -> float:
        """In [0, 1], 1 exactly when the final answer is right. Reads the inputs and the answer, never the draft."""
        ...
