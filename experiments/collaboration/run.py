"""All phases of one seed. A phase whose output exists is not repeated: a run that was stopped goes on where it was."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sysdpo_jax as sj
from experiments.collaboration.small import SmallTask
from experiments.collaboration.smollm import SmolLMTask
from experiments.collaboration.task import ALIGNMENTS, ANSWER, DRAFT, DRAFTER, REFINER, number_of_steps, optimizer_of
from experiments.common import models, runs
from experiments.common.phases import load_pairs, load_params, overlay, save_pairs, save_params
from sysdpo_jax.row_files import ROWS
from sysdpo_jax.training import Board, Report, partition
from sysdpo_jax.typing import Params, Record

METHODS = (
    "prompted",
    "best_of_n",
    "separate",
    "first_only",
    "second_only",
    "separate_sampling",
    "sysdpo_sampling",
    "sysdpo_direct",
)
# With one set of weights there are no halves to train or to freeze.
SHARED_METHODS = ("prompted", "best_of_n", "sysdpo_sampling", "sysdpo_direct")


@dataclass(frozen=True, kw_only=True)
class RunConfig(runs.HeldOutConfig):
    """One seed's run. shared: one set of weights for both nodes."""

    task: SmallTask | SmolLMTask
    shared: bool = False
    test_samples: int = 4


class SeedRun(runs.SeedRun):
    """`run` returns {method: columns of its figures}, one row a held-out run."""

    config: RunConfig

    def __init__(self, config: runs.ExperimentConfig, seed: int, folder: Path, board: Board):
        run: Any = config.run
        super().__init__(config, run.task.system(run.shared), seed, folder, board)
        self.task = self.config.task

    def run(self) -> dict[str, dict[str, np.ndarray]]:
        before = self.task.initial(self.config.shared, self.seed, self.phases)
        pairs = self._pairs(before)
        learn = partial(self._align, before, pairs)
        policies = {"prompted": before}
        if not self.config.shared:
            first, second = learn("first_only"), learn("second_only")
            policies |= {
                # With the other model frozen the system's loss is a model's own.
                "separate": _halves(learn("draft_recorded"), learn("answer_recorded")),
                "first_only": first,
                "second_only": second,
                "separate_sampling": _halves(first, second),
            }
        policies |= {name: learn(name) for name in ("sysdpo_sampling", "sysdpo_direct")}
        figures = {name: self.evaluate(name, params) for name, params in policies.items()}
        figures["best_of_n"] = self.best_of_n("prompted", before)
        return {name: figures[name] for name in (SHARED_METHODS if self.config.shared else METHODS)}

    def _pairs(self, params: Params) -> list[sj.PreferenceRecord]:
        """Preferences on the answers of whole runs to the training questions, with the drafts that led to them."""
        task = self.task
        questions, samples = task.questions("train", self.seed), task.align.samples

        def make(report: Report) -> list[sj.PreferenceRecord]:
            records = self.rollout(params, questions, samples, jax.random.fold_in(self.key("pairs"), 0), report)
            scores = np.array([task.score(record) for record in records])
            pairs = sj.make_pairs(self.system, records, scores, task.align.group, task.align.min_margin)
            if number_of_steps(pairs, task.align) == 0:
                raise ValueError(
                    f"{len(pairs)} pairs do not fill a batch of {task.align.batch_size}: raise task.align.samples"
                )
            return pairs

        path = self.folder / f"pairs{ROWS}"
        return self.phases.run("pairs", path, len(questions) * samples, make, load_pairs, save_pairs)

    def _align(self, before: Params, pairs: Sequence[sj.PreferenceRecord], name: str) -> Params:
        """Parameters after an alignment, with `before` as reference.

        Only leaves that are trained are stored: the others may be large, and `initial` gives them again.
        """
        alignment, config, system = ALIGNMENTS[name], self.task.align, self.system
        steps, size = number_of_steps(pairs, config), config.batch_size
        optimizer = optimizer_of(system, alignment.nodes, config, steps)
        mask, sft = optimizer.mask(system, before), tuple((node, config.sft) for node in alignment.nodes)

        def make(report: Report) -> Params:
            objective: sj.DirectObjective | sj.SamplingObjective
            batches: Callable[[int], Any]
            if alignment.recorded:
                objective = sj.DirectObjective(config.beta, sft=sft)
                batches = partial(sj.epoch_batches, sj.prepare_pairs(system, pairs), size)
            else:
                objective = sj.SamplingObjective(config.beta, sft=sft, chunk_size=config.chunk_size)
                number, every, texts = config.num_intermediates, config.every, sj.without_intermediates(system, pairs)
                batches = partial(sj.SearchedBatches, system, texts, size, num_intermediates=number, every=every)
            progress = self.phases.progress(name)
            trainer = sj.Trainer(system, objective, optimizer, self.folder / name, keep=1, progress=progress)
            return models.align(trainer, before, batches, steps, self.key("align"))

        return self.phases.run(
            name,
            self.folder / f"{name}.safetensors",
            None,
            make,
            lambda path: overlay(before, load_params(path)),
            lambda path, params: save_params(path, partition(params, mask)[0]),
        )

    def held_out(self) -> Sequence[Record]:
        return self.task.questions(self.config.evaluate_on, self.seed)

    def figures(self, params: Params, records: Sequence[Record]) -> dict[str, np.ndarray]:
        names = *self.system.inputs, DRAFT, ANSWER
        scores = np.array([self.task.score(record) for record in records])
        return {
            "question": np.arange(len(records)) // self.config.test_samples,
            **{name: np.array([record[name] for record in records]) for name in names},
            "score": scores,
            "right": (scores == 1.0).astype(np.float64),
        }


def _halves(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {DRAFTER: first[DRAFTER], REFINER: second[REFINER]}
