"""Batches whose intermediates the policy itself draws, anew every few steps, and what a run needs to resume them."""

import hashlib
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Int

from sysdpo_jax.batch import SampledBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.batches import epoch_rows
from sysdpo_jax.data.columns import as_values, load_columns, save_columns
from sysdpo_jax.data.intermediates import draw_intermediates, sampled_batch
from sysdpo_jax.data.records import PreferenceRecord, hold_intermediates, require_inputs, without_intermediates
from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.training.own_devices import on_own_devices
from sysdpo_jax.training.sources import encoder
from sysdpo_jax.typing import Params
from sysdpo_jax.values import content

ROWS, COUNTS = "rows of records", "sets of each row"
NAME = re.compile(r"(?P<step>\d+)(-\d+-of-(?P<count>\d+))?\.npz")


@dataclass(frozen=True)
class SearchedBatches:
    """Batches for `SamplingObjective`: rows as `epoch_batches` takes them, intermediates from the current policy.

    records: preferences on final values, without intermediates. seed: of the rows' order and of the draws.
    num_intermediates: size of Y(x); of a single one, the same on both sides, the nodes that draw it learn nothing.
    every: at the steps 0, every, 2 * every ... the policy draws for all rows of the `every` batches that follow; 1 as
    in arXiv 2502.17721. Rows that come twice among them are drawn once, so it saves draws only where it is longer than
    an epoch.
    shard: (index, count) as `batch_shard(mesh)` says for this process, which draws for its own rows on its own devices
    (see `on_own_devices`); a run may go on with another count. Draws without noise, such as a language model's beams,
    are the same for every count.
    Values must be strings, numbers, or arrays of one shape. Raises `RecordError` naming the row for records that hold
    intermediates or lack an input or a final value, `GraphError` for a system without intermediates, and `ValueError`
    for a number below 1, fewer rows than a batch, or processes that do not have a shard each.
    """

    system: CompoundSystem = field(compare=False)
    records: Sequence[PreferenceRecord] = field(compare=False, repr=False)
    batch_size: int
    seed: int
    num_intermediates: int = 8
    every: int = 1
    shard: tuple[int, int] = field(default=(0, 1), compare=False)

    def __post_init__(self) -> None:
        if self.num_intermediates < 1 or self.every < 1:
            raise ValueError(
                f"SearchedBatches: num_intermediates {self.num_intermediates} and every {self.every} must be at least 1"
            )
        if jax.process_count() not in (1, self.shard[1]):
            raise ValueError(
                f"SearchedBatches: shard {self.shard} is none of {jax.process_count()}, one for each process: give "
                "batch_shard(mesh), of a mesh whose data x fsdp is a multiple of the processes"
            )
        if not self.system.intermediates:
            raise GraphError("the system has no intermediate values to search for: train it with DirectObjective")
        if self.records and hold_intermediates(self.system, self.records):
            raise RecordError(
                "the records hold intermediate values, which SearchedBatches would not read: train with "
                "DirectObjective, or drop them with without_intermediates"
            )
        require_inputs(self.system, [record.inputs for record in self.records])
        without_intermediates(self.system, self.records)
        self.rows_at(0)

    @property
    def rows_at(self) -> Callable[[int], Int[Any, "batch"]]:
        """The numbers of the records in this shard of the batch of a step."""
        return epoch_rows(len(self.records), self.batch_size, self.seed, self.shard)

    def fingerprint(self) -> str:
        """The same for records of the same inputs, in every process: final values may be mended between two starts."""
        rows = [content(record.inputs) for record in self.records]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


class IntermediateSearch:
    """The batches of one run. What was drawn at a step is in `<directory>/<step>.npz`: a resumed run reads it there.

    Of several processes each writes `<step>-<number>-of-<count>.npz`; a run that goes on with another count reads all.
    A file holds the numbers of the records, the number of sets of each, and the values of every intermediate node.
    """

    def __init__(self, batches: SearchedBatches, directory: Path):
        self._batches, self._directory, self._rows_at = batches, directory, batches.rows_at
        self._records = without_intermediates(batches.system, batches.records)
        # The step whose policy drew the present sets, by record.
        self._drawn_at: int | None = None
        self._sets: dict[int, list[dict[str, Any]]] = {}
        # What tools gave: they are called once for what a policy drew.
        self._known: dict[tuple[str, Hashable], Any] = {}
        self._encode: Callable[[SampledBatch], SampledBatch] | None = None

    def batch(self, step: int, params: Params) -> SampledBatch:
        """The batch of a step, which all processes ask for. params: the policy that has made `step` updates."""
        drawn_at = self._start(step)
        if drawn_at == step:
            self._draw(step, params)
        if drawn_at != self._drawn_at or drawn_at == step:
            # What is used is what is on disk, so that a resumed run uses the same.
            self._read(drawn_at)
        rows = self._rows_at(step).tolist()
        records, sets = [self._records[row] for row in rows], [self._sets[row] for row in rows]
        spec = self._batches
        try:
            batch = sampled_batch(spec.system, records, sets, spec.num_intermediates, step - drawn_at, self._known)
        except RecordError as error:
            raise RecordError(f"the batch of the records {rows}, counted from 0: {error}") from error
        if self._encode is None:
            # Frozen parts are those of every step.
            self._encode = encoder(spec.system, params)
        return self._encode(batch)

    def forget(self, checkpoint: int) -> None:
        """Delete what a run resumed at this checkpoint, or at a later one, does not read."""
        for path in self._directory.glob("*.npz"):
            name = NAME.fullmatch(path.name)
            if name is not None and int(name["step"]) < self._start(checkpoint):
                # Each process deletes what it finds.
                path.unlink(missing_ok=True)

    def _start(self, step: int) -> int:
        return step - step % self._batches.every

    def _rows_from(self, step: int) -> list[int]:
        """The records of the batches that a draw serves, each once, in their order."""
        steps = range(step, step + self._batches.every)
        return list(dict.fromkeys(row for at in steps for row in self._rows_at(at).tolist()))

    def _draw(self, step: int, params: Params) -> None:
        spec, rows = self._batches, self._rows_from(step)
        own, (index, count) = on_own_devices(params), spec.shard
        # What tools gave of inputs alone stays; of what an earlier policy drew it would fill the memory.
        given = {node.name for node in spec.system.given}
        self._known = {key: value for key, value in self._known.items() if key[0] in given}
        size = spec.batch_size // count
        key = jax.random.fold_in(jax.random.key(spec.seed), step)
        sets: list[list[dict[str, Any]]] = []
        for number, start in enumerate(range(0, len(rows), size)):
            part = rows[start : start + size]
            inputs = [{**self._records[row].inputs, **self._given(row)} for row in part]
            part_key = jax.random.fold_in(key, number * count + index)
            try:
                # Slices of one size, so that nothing recompiles and memory is bounded.
                sets += draw_intermediates(
                    spec.system, own, inputs, spec.num_intermediates, part_key, size, self._known
                )
            except RecordError as error:
                raise RecordError(f"the intermediates of the records {part}, counted from 0: {error}") from error
        columns: dict[str, Any] = {
            node.name: [y[node.name] for kept in sets for y in kept] for node in spec.system.intermediates
        }
        # Those of an earlier start with another count, which came to no checkpoint behind this step.
        for path in [path for path, its_count in self._files(step).items() if its_count != count and index == 0]:
            path.unlink()
        self._directory.mkdir(parents=True, exist_ok=True)
        save_columns(self._path(step), columns | {ROWS: rows, COUNTS: [len(kept) for kept in sets]})

    def _given(self, row: int) -> dict[str, Any]:
        chosen = self._records[row].chosen
        return {node.name: chosen[node.name] for node in self._batches.system.given if node.name in chosen}

    def _read(self, step: int) -> None:
        path, present = self._path(step), self._files(step)
        if path not in present and set(present.values()) != {len(present)}:
            raise FileNotFoundError(
                f"{path} with the intermediates drawn at step {step} is missing, so the run cannot go on as it was: "
                "restore the file, or train in another directory"
            )
        self._sets, self._drawn_at = {}, step
        for part in [path] if path in present else present:
            columns = {name: as_values(column) for name, column in load_columns(part).items()}
            rows, counts = columns.pop(ROWS), columns.pop(COUNTS)
            sets = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
            self._sets |= {row: [next(sets) for _ in range(count)] for row, count in zip(rows, counts, strict=True)}

    def _path(self, step: int) -> Path:
        index, count = self._batches.shard
        part = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
        return self._directory / f"{step:08d}{part}.npz"

    def _files(self, step: int) -> dict[Path, int]:
        """What there is of a step, and of how many files each is one."""
        names = [(path, NAME.fullmatch(path.name)) for path in sorted(self._directory.glob(f"{step:08d}*.npz"))]
        return {path: int(name["count"] or 1) for path, name in names if name is not None}
