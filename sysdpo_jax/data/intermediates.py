"""The intermediates of SysDPO-Sampling: drawn from a policy, and joined to preferences on final values."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.records import SIDES, PreferenceRecord, require_inputs
from sysdpo_jax.graph import CompoundSystem, GraphError, Known, Node
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.values import distinct

# A value for every intermediate node of one run.
Intermediates = Mapping[str, Any]
# Both sides of a preference, each a whole run.
Sides = Mapping[str, Record]


def draw_intermediates(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    number: int,
    key: PRNGKeyArray,
    size: int | None = None,
    known: Known | None = None,
) -> list[list[dict[str, Any]]]:
    """From 1 to `number` distinct likely sets `{intermediate node: value}` for every row of inputs.

    The first node spreads into `number` candidates (a language model's by its diverse beam search), each of which the
    next ones continue with their likeliest value, or with more while no row has `number` sets. A row of inputs may hold
    values of `system.given` too. Sets that a tool refuses, or skips, are left out.
    size: rows that components draw at a time, the others of which are thrown away; as many as inputs by default.
    known: see `CompoundSystem.complete`; by default a tool is called for each set.
    Raises `GraphError` for a system without intermediates, `RecordError` for a row that lacks an input, a tool that
    fails or leaves a row without a set, and `ValueError` for parameters that do not belong to the system or a number
    below 1.
    """
    system.check_params(params)
    wanted = [node.name for node in system.intermediates]
    if not wanted:
        raise GraphError("the system has no intermediate values to draw: its preferences are for DirectObjective")
    if number < 1 or not inputs:
        raise ValueError(f"draw_intermediates: number {number} and the rows of inputs {len(inputs)} must be at least 1")
    require_inputs(system, inputs)
    sets: list[list[dict[str, Any]]] = [[dict(row)] for row in inputs]
    size = len(inputs) if size is None else size
    last = max(place for place, node in enumerate(system.nodes) if node.name in wanted)
    for node in system.nodes[: last + 1]:
        rows = list(chain.from_iterable(sets))
        # Final values are not drawn, and no intermediate depends on a tool that reads one.
        if any(parent not in rows[0] for parent in node.parents) or node in system.outputs:
            continue
        if node.deterministic:
            sets = _with_tool(system, node, sets, known)
            continue
        # Numbers that do not depend on how many distinct values each row has: nothing compiles anew.
        longest = max(map(len, sets))
        filled = rows + [rows[-1]] * (size * longest - len(rows))
        columns = {name: [row[name] for row in filled] for name in node.parents}
        found = system.node_candidates(node, params, columns, math.ceil(number / longest), key)
        longer = iter([{**row, node.name: value} for value in own] for row, own in zip(rows, found, strict=False))
        # The best of each first, then the second best of each.
        sets = [_by_turns([next(longer) for _ in kept])[:number] for kept in sets]
    return [[{name: row[name] for name in wanted} for row in kept] for kept in sets]


def _with_tool(
    system: CompoundSystem, node: Node, sets: Sequence[Sequence[dict[str, Any]]], known: Known | None
) -> list[list[dict[str, Any]]]:
    """The sets with the values of a tool, which those that have one keep; without the sets that it gives none for."""
    lacking = [row for row in chain.from_iterable(sets) if node.name not in row]
    columns = {name: [row[name] for row in lacking] for name in node.parents}
    answers = iter(system.tool_values(node, columns, known) if lacking else ())
    made = []
    for place, kept in enumerate(sets):
        values = [row[node.name] if node.name in row else next(answers) for row in kept]
        _stop_on_failure(values, f"row {place}")
        usable = [row | {node.name: value} for row, value in zip(kept, values, strict=True) if not _failed(value)]
        if not usable:
            raise values[0].at(f"row {place}")
        made.append(usable)
    return made


def _failed(value: Any) -> bool:
    return isinstance(value, ToolError)


def _stop_on_failure(values: Sequence[Any], place: str) -> None:
    """Raise a `ToolError` among the values that is neither a refusal nor to be skipped."""
    failures = [value for value in values if isinstance(value, ToolError) and not (value.skip or value.refused)]
    for failure in failures:
        raise failure.at(place)


def sampled_batch(
    system: CompoundSystem,
    records: Sequence[PreferenceRecord],
    intermediates: Sequence[Sequence[Intermediates]],
    number: int,
    staleness: int = 0,
    known: Known | None = None,
) -> SampledBatch:
    """The features of both sides with every distinct set of intermediates, padded to `number` sets a row.

    records: as `without_intermediates` returns them. staleness: steps since the policy drew the sets.
    known: see `CompoundSystem.complete`.
    Sets that no final value can be prepared with (a tool or a prompt refuses them, a tool skips them) are left out.
    Raises `RecordError` as `prepare` does where a row keeps no set, for a tool that fails, and for a row with no set or
    more than `number`.
    """
    inner, outer = ([node.name for node in nodes] for nodes in (system.intermediates, system.outputs))
    kept = [distinct({name: y[name] for name in inner} for y in sets) for sets in intermediates]
    for row, sets in enumerate(kept):
        if not 1 <= len(sets) <= number:
            raise RecordError(f"row {row} has {len(sets)} distinct sets of intermediates, outside 1..{number}")

    pairs = _completed(system, records, kept, {} if known is None else known)

    def prepared(side: str, names: Sequence[str]) -> dict[str, Any]:
        # Of a row with fewer sets the first again: no tool is called for what fills the row up.
        rows = [pair[side] for own in pairs for pair in [*own, *[own[0]] * (number - len(own))]]
        try:
            features = system.prepare(rows, names)
        except RecordError as error:
            raise RecordError(f"{side} runs (rows count intermediates, {number} a record): {error}") from error
        return jax.tree.map(lambda x: np.reshape(x, (len(records), number, *x.shape[1:])), features)

    def both() -> tuple[dict[str, Any], PairBatch]:
        return prepared("chosen", inner), PairBatch(prepared("chosen", outer), prepared("rejected", outer))

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
            made[side] = iter(system.complete(rows, nodes, known))
        except RecordError as error:
            raise RecordError(f"{side} runs (rows count intermediates): {error}") from error
    pairs: list[list[Sides]] = []
    for row, own in enumerate(sets):
        both: list[Sides] = [{side: next(made[side]) for side in SIDES} for _ in own]
        values: list[Any] = [value for pair in both for value in pair.values()]
        _stop_on_failure(values, f"row {row}")
        pairs.append([pair for pair in both if not any(map(_failed, pair.values()))])
        if not pairs[-1]:
            raise next(filter(_failed, values)).at(f"row {row}: none of its {len(own)} sets of intermediates is usable")
    return pairs


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


def _by_turns(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]
