"""The intermediates of SysDPO-Sampling: drawn anew every few steps, kept, and joined to final values."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sysdpo_jax.batch import PairBatch, SampledBatch, share
from sysdpo_jax.components.base import RecordError, as_rows
from sysdpo_jax.components.control import Switch
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.batches import epoch_rows
from sysdpo_jax.data.records import (
    SIDES,
    PreferenceRecord,
    hold_intermediates,
    prepare_sides,
    require_inputs,
    require_searchable,
    without_intermediates,
)
from sysdpo_jax.data.rollouts import draw_intermediates, failed, stop_on_failure
from sysdpo_jax.graph import CompoundSystem, GraphError, Known, Node
from sysdpo_jax.manifest import describe, digest
from sysdpo_jax.row_files import LEAVES, ROWS, RowFile, write_row_file
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.values import content, distinct

# The file of a draw, or of a process's part of it.
NAME = re.compile(r"(?P<step>\d+)(-\d+-of-(?P<count>\d+))?")

# A value for every intermediate node of one run.
Intermediates = Mapping[str, Any]
# Both sides of a preference, each a whole run.
Sides = Mapping[str, Record]


def sampled_batch(
    system: CompoundSystem,
    records: Sequence[PreferenceRecord],
    intermediates: Sequence[Sequence[Intermediates]],
    number: int,
    staleness: int = 0,
    known: Known | None = None,
) -> SampledBatch:
    """The features of both sides with every distinct set of intermediates.

    Sets that no final value can be prepared with (a tool or a prompt refuses them, a tool skips them) are left out.

    Args:
        system: The graph.
        records: As `without_intermediates` returns them.
        intermediates: As `draw_intermediates` returns them.
        number: Sets that a row is padded to.
        staleness: Steps since the policy drew them.
        known: See `CompoundSystem.complete`.

    Returns:
        The batch, raw.

    Raises:
        RecordError: As `prepare` does where a row keeps no set, for a tool that fails, and for a row with no set or
            more than `number`.
    """
    require_searchable(system)
    inner, outer = ([node.name for node in nodes] for nodes in (system.intermediates, system.outputs))
    kept = [distinct({name: y[name] for name in inner if name in y} for y in sets) for sets in intermediates]
    for row, sets in enumerate(kept):
        if not 1 <= len(sets) <= number:
            raise RecordError(f"row {row} has {len(sets)} distinct sets of intermediates, outside 1..{number}")

    pairs = _completed(system, records, kept, {} if known is None else known)

    def prepared(names: Sequence[str]) -> list[dict[str, Any]]:
        # Of a row with fewer sets the first again: no tool is called for what fills the row up.
        rows = [pair for own in pairs for pair in [*own, *[own[0]] * (number - len(own))]]
        what = f"runs (rows count intermediates, {number} a record)"
        sides = prepare_sides(system, [[pair[side] for side in SIDES] for pair in rows], names, what=what)
        return jax.tree.map(lambda x: np.reshape(x, (len(records), number, *x.shape[1:])), sides)

    def both() -> tuple[dict[str, Any], PairBatch]:
        # Intermediates of a row that read its inputs alone read the same; so do both sides' final values of one set.
        sides = share(system, [as_rows(side, 2) for side in prepared(outer)], _alike(system, outer))
        outputs = [jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]), side) for side in sides]
        return share(system, prepared(inner)[:1], _alike(system, inner))[0], PairBatch(*outputs)

    try:
        features, outputs = both()
    except RecordError:
        pairs = [_usable(system, own, row) for row, own in enumerate(pairs)]
        features, outputs = both()
    return SampledBatch(
        intermediates=features,
        outputs=outputs,
        valid=np.arange(number) < np.array([[len(own)] for own in pairs]),
        staleness=np.full(len(records), staleness, np.int32),
    )


def _alike(system: CompoundSystem, names: Sequence[str]) -> list[str]:
    """Those of these nodes that read none of the others' values: by the graph, so that all processes mark the same."""
    others = {name for name in names if not system.node(name).deterministic}
    plates = {node.name for node in system.nodes if node.plate is not None}

    def reads(name: str) -> set[str]:
        return {node.name for node in system.with_ancestors([name])} - {name}

    # Copies of a plate have prompts of their own where a parent is one too.
    return [
        name
        for name in names
        if not reads(name) & others and not (name in plates and plates & set(system.node(name).parents))
    ]


def _completed(
    system: CompoundSystem,
    records: Sequence[PreferenceRecord],
    sets: Sequence[Sequence[Intermediates]],
    known: Known,
) -> list[list[Sides]]:
    """Both sides of every record with each of its sets and the values of tools, without the sets that a tool refuses.

    Raises `RecordError` for a tool that fails, and for a record that keeps no set.
    """
    nodes = [node.name for node in (*system.intermediates, *system.outputs)]
    made: dict[str, Any] = {}
    for side in SIDES:
        rows = [
            {**record.inputs, **getattr(record, side), **y}
            for record, own in zip(records, sets, strict=True)
            for y in own
        ]
        try:
            placed = routed_values(system, rows, known)
            whole = iter(system.complete([row for row in placed if not failed(row)], nodes, known))
            made[side] = iter([row if failed(row) else next(whole) for row in placed])
        except RecordError as error:
            raise RecordError(f"{side} runs (rows count intermediates): {error}") from error
    pairs: list[list[Sides]] = []
    for row, own in enumerate(sets):
        both: list[Sides] = [{side: next(made[side]) for side in SIDES} for _ in own]
        values: list[Any] = [value for pair in both for value in pair.values()]
        stop_on_failure(values, f"row {row}")
        pairs.append([pair for pair in both if not any(map(failed, pair.values()))])
        if not pairs[-1]:
            raise next(filter(failed, values)).at(f"row {row}: none of its {len(own)} sets of intermediates is usable")
    return pairs


def routed_values(system: CompoundSystem, rows: Sequence[Record], known: Known) -> list[Any]:
    """The rows with the final value of a switch under the branch that is chosen in them.

    What a switch ends in is an outcome whichever branch made it: p(z | x) is summed over the routes to it. In the place
    of a row whose branch is no final value, and could not make it, is a `ToolError`.
    """
    final = {node.name for node in system.outputs}
    moved: list[Any] = [dict(row) for row in rows]
    for node in system.recorded:
        branches = node.parents[1:] if isinstance(node.component, Switch) else ()
        if not final.intersection(branches):
            continue
        chooser = [node.parents[0]] if node.parents[0] not in system.inputs else []
        alive = [place for place, row in enumerate(moved) if not failed(row)]
        others = [{name: x for name, x in moved[place].items() if name not in branches} for place in alive]
        for place, view in zip(alive, system.complete(others, chooser, known), strict=True):
            moved[place] = view if failed(view) else _moved(system, node, moved[place], view)
    return moved


def _moved(system: CompoundSystem, switch: Node, row: dict[str, Any], view: Record) -> Any:
    """The row with the value that it has of a branch under the one that is chosen. view: with what chooses."""
    held = [name for name in switch.parents[1:] if name in row]
    try:
        if len(held) != 1 or not system.flow.runs(switch.name, view):
            return row
        branch = system.flow.chosen(switch.name, view)
    except ToolError as error:
        return error
    if branch not in {node.name for node in system.outputs}:
        return ToolError(f"node {switch.name!r}: the branch {branch!r} gives no final value", refused=True)
    return {name: x for name, x in row.items() if name != held[0]} | {branch: row[held[0]]}


def _usable(system: CompoundSystem, pairs: Sequence[Sides], row: int) -> list[Sides]:
    """Those that can be prepared. Raises `RecordError` where there is none."""
    usable, errors = [], []
    for pair in pairs:
        try:
            system.prepare([pair[side] for side in SIDES])
        except RecordError as error:
            errors.append(error)
        else:
            usable.append(pair)
    if not usable:
        raise RecordError(
            f"row {row}: its final values cannot be prepared with any of its {len(pairs)} sets of intermediates "
            f"(chosen is row 0, rejected row 1 in what follows): {errors[0]}"
        ) from errors[0]
    return usable


@dataclass(frozen=True)
class SearchedBatches:
    """Batches for `SamplingObjective`: rows as `epoch_batches` takes them, intermediates from the current policy.

    Draws without noise, such as a language model's beams, are the same for every number of processes.

    Args:
        system: The graph.
        records: Preferences on final values, without intermediates. Values must be strings, numbers, or arrays of one
            shape.
        batch_size: Rows of a batch, of all processes together.
        seed: Of the rows' order and of the draws.
        num_intermediates: Size of Y(x); of a single one, the same on both sides, the nodes that draw it learn nothing.
        every: At the steps 0, every, 2 * every ... the policy draws for all rows of the `every` batches that follow; 1
            as in arXiv 2502.17721. Rows that come twice among them are drawn once, so it saves draws only where it is
            longer than an epoch.
        shard: (index, count) as `batch_shard(mesh)` says for this process, which draws for its own rows on its own
            devices (see `replicate_per_process`); a run may go on with another count.

    Raises:
        RecordError: Naming the row, for records that hold intermediates or lack an input or a final value.
        GraphError: For a system without intermediates, or with a loop.
        ValueError: For a number below 1, fewer rows than a batch, or processes that do not have a shard each.
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
        require_searchable(self.system)
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

    def fingerprint(self) -> dict[str, str]:
        """What a run that goes on must have in every process: final values may be fixed between two starts.

        Returns:
            `{what: digest}`.
        """
        rows = [content(record.inputs) for record in self.records]
        return {**describe("batches", self), "records": digest(rows)}


class IntermediateSearch:
    """The batches of one run. What was drawn at a step is in the rows of `<directory>/<step>`, for a resumed run.

    Of several processes each writes `<step>-<number>-of-<count>`; a run that goes on with another count reads all.
    A row is of a record: its number, and its sets of intermediate values.
    """

    def __init__(self, batches: SearchedBatches, directory: Path):
        self._batches, self._directory, self._rows_at = batches, directory, batches.rows_at
        self._records = without_intermediates(batches.system, batches.records)
        # The step whose policy drew the present sets, by record.
        self._drawn_at: int | None = None
        self._sets: dict[int, list[dict[str, Any]]] = {}
        # What tools gave: they are called once for what a policy drew.
        self._known: dict[tuple[str, Hashable], Any] = {}

    def batch(self, step: int, policy: Callable[[], Params]) -> SampledBatch:
        """The raw batch of a step, which all processes ask for.

        policy: gives the parameters after `step` updates, whole on this process's devices; all processes call it then.
        """
        drawn_at = self._start(step)
        if drawn_at == step:
            self._draw(step, policy())
        if drawn_at != self._drawn_at or drawn_at == step:
            # What is used is what is on disk, so that a resumed run uses the same.
            self._read(drawn_at)
        rows = self._rows_at(step).tolist()
        records, sets = [self._records[row] for row in rows], [self._sets[row] for row in rows]
        spec = self._batches
        try:
            return sampled_batch(spec.system, records, sets, spec.num_intermediates, step - drawn_at, self._known)
        except RecordError as error:
            raise RecordError(f"the batch of the records {rows}, counted from 0: {error}") from error

    def forget(self, checkpoint: int) -> None:
        """Delete what a run resumed at this checkpoint, or at a later one, does not read."""
        for path in self._directory.glob("*.arrow"):
            name = NAME.match(path.name)
            if name is not None and int(name["step"]) < self._start(checkpoint):
                # Each process deletes what it finds.
                path.unlink(missing_ok=True)

    def _start(self, step: int) -> int:
        return step - step % self._batches.every

    def _draw(self, step: int, params: Params) -> None:
        spec = self._batches
        index, count = spec.shard
        # The records of the batches that the draw serves, each once, in their order.
        served = (row for at in range(step, step + spec.every) for row in self._rows_at(at).tolist())
        rows = list(dict.fromkeys(served))
        # What tools gave of inputs alone stays; of what an earlier policy drew it would fill the memory.
        given = {node.name for node in spec.system.given}
        self._known = {key: value for key, value in self._known.items() if key[0] in given}
        size = spec.batch_size // count
        key = jax.random.fold_in(jax.random.key(spec.seed), step)
        sets: list[list[dict[str, Any]]] = []
        for number, start in enumerate(range(0, len(rows), size)):
            part = rows[start : start + size]
            records = [self._records[row] for row in part]
            inputs = [
                {**r.inputs, **{name: value for name, value in r.chosen.items() if name in given}} for r in records
            ]
            part_key = jax.random.fold_in(key, number * count + index)
            try:
                # Slices of one size, so that nothing recompiles and memory is bounded.
                sets += draw_intermediates(
                    spec.system, params, inputs, spec.num_intermediates, part_key, size, self._known
                )
            except RecordError as error:
                raise RecordError(f"the intermediates of the records {part}, counted from 0: {error}") from error
        # Those of an earlier start with another count, which came to no checkpoint behind this step.
        for path in [path for path, its_count in self._files(step).items() if its_count != count and index == 0]:
            for ending in (ROWS, LEAVES):
                path.with_name(f"{path.name}{ending}").unlink(missing_ok=True)
        write_row_file(self._path(step), ({"record": row, "sets": own} for row, own in zip(rows, sets, strict=True)))

    def _read(self, step: int) -> None:
        path, present = self._path(step), self._files(step)
        if path not in present and set(present.values()) != {len(present)}:
            raise FileNotFoundError(
                f"{path}{ROWS} with the intermediates drawn at step {step} is missing, so the run cannot go on as it "
                "was: restore the file, or train in another directory"
            )
        self._sets, self._drawn_at = {}, step
        remedy = "restore it, or train in another directory"
        for part in [path] if path in present else present:
            self._sets |= {row["record"]: row["sets"] for row in RowFile(part, remedy)}

    def _path(self, step: int) -> Path:
        index, count = self._batches.shard
        part = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
        return self._directory / f"{step:08d}{part}"

    def _files(self, step: int) -> dict[Path, int]:
        """What there is of a step, and of how many files each is one."""
        paths = [p.with_name(p.name.removesuffix(ROWS)) for p in sorted(self._directory.glob(f"{step:08d}*{ROWS}"))]
        names = [(path, NAME.fullmatch(path.name)) for path in paths]
        return {path: int(name["count"] or 1) for path, name in names if name is not None}
