"""All phases of one seed. A phase whose output exists is not repeated: a run that was stopped goes on where it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.collaboration.align import ALIGNMENTS, align, number_of_steps, optimizer_of
from experiments.collaboration.small import SmallTask
from experiments.collaboration.smollm import SmolLMTask
from experiments.collaboration.task import ANSWER, DRAFT, DRAFTER, REFINER, Task
from experiments.common.phases import Phases
from experiments.common.runs import best_of, reported_rollout
from experiments.common.storage import load_pairs, load_params, overlay, save_pairs, save_params
from sysdpo_jax import PreferenceRecord, make_pairs
from sysdpo_jax.io import read_arrays, write_arrays
from sysdpo_jax.keys import named_key
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


@dataclass(frozen=True)
class RunConfig:
    """One seed's run.

    shared: one set of weights for both nodes. test_samples: runs of each held-out question. best_of: the N of
    best-of-n. batch_runs: runs made at once.
    """

    task: SmallTask | SmolLMTask
    shared: bool = False
    evaluate_on: Literal["validation", "test"] = "test"
    test_samples: int = 4
    best_of: int = 4
    batch_runs: int = 256


class SeedRun:
    """One seed in a folder of its own. `run` returns {method: columns of its figures}, one row a held-out run."""

    def __init__(self, config: RunConfig, seed: int, folder: Path, board: Board):
        self.config, self.seed, self.folder = config, seed, folder
        self.task: Task = config.task
        self.system = self.task.system(config.shared)
        self._phases = Phases(folder, f"seed {seed}", board)
        self._key = jax.random.key(seed)

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: seconds it took}, phases of earlier starts included."""
        return self._phases.seconds

    def run(self) -> dict[str, dict[str, np.ndarray]]:
        before = self.task.initial(self.config.shared, self.seed, self._phases)
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
        figures = {name: self._evaluate(name, params) for name, params in policies.items()}
        more = (self._evaluate("prompted", before, repeat) for repeat in range(1, self.config.best_of))
        figures["best_of_n"] = best_of([figures["prompted"], *more])
        return {name: figures[name] for name in (SHARED_METHODS if self.config.shared else METHODS)}

    def _pairs(self, params: Params) -> list[PreferenceRecord]:
        """Preferences on the answers of whole runs to the training questions, with the drafts that led to them."""
        task = self.task
        questions, samples = task.questions("train", self.seed), task.align.samples

        def make(report: Report) -> list[PreferenceRecord]:
            records = self._rollout(params, questions, samples, "pairs", 0, report)
            scores = np.array([task.score(record) for record in records])
            pairs = make_pairs(self.system, records, scores, task.align.group, task.align.min_margin)
            if number_of_steps(pairs, task.align) == 0:
                raise ValueError(
                    f"{len(pairs)} pairs do not fill a batch of {task.align.batch_size}: raise task.align.samples"
                )
            return pairs

        path = self.folder / f"pairs{ROWS}"
        return self._phases.run("pairs", path, len(questions) * samples, make, load_pairs, save_pairs)

    def _align(self, before: Params, pairs: Sequence[PreferenceRecord], name: str) -> Params:
        """Only leaves that are trained are stored: the others may be large, and `initial` gives them again."""
        alignment, config = ALIGNMENTS[name], self.task.align
        folder, key, progress = self.folder / name, named_key(self._key, "align"), self._phases.progress(name)
        optimizer = optimizer_of(self.system, alignment.nodes, config, number_of_steps(pairs, config))
        mask = optimizer.mask(self.system, before)
        return self._phases.run(
            name,
            self.folder / f"{name}.safetensors",
            None,
            lambda report: align(self.system, before, pairs, alignment, config, folder, key, progress),
            lambda path: overlay(before, load_params(path)),
            lambda path, params: save_params(path, partition(params, mask)[0]),
        )

    def _evaluate(self, name: str, params: Params, repeat: int = 0) -> dict[str, np.ndarray]:
        """Figures of held-out runs. The key depends on the repeat alone: every method draws the same noise."""
        questions = self.task.questions(self.config.evaluate_on, self.seed)
        samples = self.config.test_samples
        label = f"evaluate_{name}" if repeat == 0 else f"evaluate_{name}_{repeat}"

        def make(report: Report) -> dict[str, np.ndarray]:
            records = self._rollout(params, questions, samples, "evaluate", repeat, report)
            return self._figures(records)

        path = self.folder / f"{label}.npz"
        return self._phases.run(label, path, len(questions) * samples, make, read_arrays, write_arrays)

    def _figures(self, records: Sequence[Record]) -> dict[str, np.ndarray]:
        columns = {name: np.array([record[name] for record in records]) for name in self.system.inputs}
        scores = np.array([self.task.score(record) for record in records])
        return {
            "question": np.arange(len(records)) // self.config.test_samples,
            **columns,
            DRAFT: np.array([record[DRAFT] for record in records]),
            ANSWER: np.array([record[ANSWER] for record in records]),
            "score": scores,
            "right": (scores == 1.0).astype(np.float64),
        }

    def _rollout(
        self, params: Params, questions: Sequence[Record], samples: int, name: str, repeat: int, report: Report
    ) -> list[dict[str, Any]]:
        key = jax.random.fold_in(named_key(self._key, name), repeat)
        return reported_rollout(self.system, params, questions, key, samples, self.config.batch_runs, report)


def _halves(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {DRAFTER: first[DRAFTER], REFINER: second[REFINER]}
