"""Batches whose intermediates the policy itself draws, anew every few steps, and what a run needs to resume them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.batches import epoch_rows
from sysdpo_jax.data.columns import as_values, load_columns, save_columns
from sysdpo_jax.data.intermediates import draw_intermediates, sampled_batch
from sysdpo_jax.data.records import PreferenceRecord, hold_intermediates, without_intermediates
from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.objectives.log_ratio import SampledBatch
from sysdpo_jax.typing import Params

COUNTS = "sets of each row"


@dataclass(frozen=True)
class SearchedBatches:
    """Batches for `SamplingObjective`: rows as `epoch_batches` takes them, intermediates from the current policy.

    records: preferences on final values, without intermediates. seed: of the rows' order and of the draws.
    num_intermediates: size of Y(x). every: intermediates are drawn anew at the steps 0, every, 2 * every ...; 1 as in
    arXiv 2502.17721. In between a batch whose rows all have some keeps them; another has all of its rows drawn.
    Raises `RecordError` naming the row for records that hold intermediates or lack a final value, `GraphError` for a
    system without intermediates, and `ValueError` for a number below 1 or fewer rows than a batch.
    """

    system: CompoundSystem = field(compare=False)
    records: Sequence[PreferenceRecord] = field(compare=False, repr=False)
    batch_size: int
    seed: int
    num_intermediates: int = 8
    every: int = 1

    def __post_init__(self) -> None:
        if self.num_intermediates < 1 or self.every < 1:
            raise ValueError(
                f"SearchedBatches: num_intermediates {self.num_intermediates} and every {self.every} must be at least 1"
            )
        if not self.system.intermediates:
            raise GraphError("the system has no intermediate values to search for: train it with DirectObjective")
        if hold_intermediates(self.system, self.records):
            raise RecordError(
                "the records hold intermediate values, which SearchedBatches would not read: train with "
                "DirectObjective, or drop them with without_intermediates"
            )
        without_intermediates(self.system, self.records)
        epoch_rows(len(self.records), self.batch_size, self.seed)


class IntermediateSearch:
    """The batches of one run. What was drawn at a step is in `<directory>/<step>.npz`: a resumed run reads it there.

    A file holds the values of every intermediate node, row after row of its batch, and the number of sets of each row.
    """

    def __init__(self, batches: SearchedBatches, directory: Path):
        self._batches, self._directory = batches, directory
        self._rows_at = epoch_rows(len(batches.records), batches.batch_size, batches.seed)
        # {row: (step of the policy that drew them, sets of intermediates)}
        self._drawn: dict[int, tuple[int, list[dict[str, Any]]]] = {}
        self._next = 0
        directory.mkdir(parents=True, exist_ok=True)

    def batch(self, step: int, params: Params) -> SampledBatch:
        """The batch of a step. params: the policy that has made `step` updates."""
        if step != self._next:
            self._remember(step)
        spec = self._batches
        if step % spec.every == 0:
            self._drawn.clear()
        rows = self._rows_at(step).tolist()
        records = [spec.records[row] for row in rows]
        if self._lacks(rows):
            key = jax.random.fold_in(jax.random.key(spec.seed), step)
            inputs = [record.inputs for record in records]
            self._write(step, draw_intermediates(spec.system, params, inputs, spec.num_intermediates, key))
            # What is used is what is on disk, so that a resumed run uses the same.
            self._read(step)
        self._next = step + 1
        steps, sets = zip(*(self._drawn[row] for row in rows), strict=True)
        return sampled_batch(spec.system, records, sets, spec.num_intermediates, [step - drawn for drawn in steps])

    def forget(self, checkpoint: int) -> None:
        """Delete what a run resumed at this checkpoint, or at a later one, does not read."""
        for path in self._directory.glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) < self._start(checkpoint):
                path.unlink()

    def _remember(self, step: int) -> None:
        """The state before `step` of a run that began at step 0."""
        self._drawn.clear()
        for past in range(self._start(step), step):
            if self._lacks(self._rows_at(past).tolist()):
                self._read(past)

    def _start(self, step: int) -> int:
        return step - step % self._batches.every

    def _lacks(self, rows: Sequence[int]) -> bool:
        return not all(row in self._drawn for row in rows)

    def _write(self, step: int, sets: Sequence[Sequence[dict[str, Any]]]) -> None:
        names = [node.name for node in self._batches.system.intermediates]
        columns: dict[str, Any] = {name: [y[name] for kept in sets for y in kept] for name in names}
        save_columns(self._path(step), columns | {COUNTS: [len(kept) for kept in sets]})

    def _read(self, step: int) -> None:
        path = self._path(step)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} with the intermediates drawn at step {step} is missing, so the run cannot go on as it was: "
                "restore the file, or train in another directory"
            )
        columns = {name: as_values(column) for name, column in load_columns(path).items()}
        counts = columns.pop(COUNTS)
        sets = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        for row, count in zip(self._rows_at(step).tolist(), counts, strict=True):
            self._drawn[row] = step, [next(sets) for _ in range(count)]

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:08d}.npz"
