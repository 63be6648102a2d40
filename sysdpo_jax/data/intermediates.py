"""The intermediates of SysDPO-Sampling: drawn from a policy, and joined to preferences on final values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.records import PreferenceRecord, require_inputs
from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.objectives.log_ratio import PairBatch, SampledBatch
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.values import distinct

# A value for every intermediate node of one run.
Intermediates = Mapping[str, Any]


def draw_intermediates(
    system: CompoundSystem, params: Params, inputs: Sequence[Record], number: int, key: PRNGKeyArray
) -> list[list[dict[str, Any]]]:
    """From 1 to `number` distinct likely sets `{intermediate node: value}` for every row of inputs.

    The first node spreads into `number` candidates (a language model's by its diverse beam search), each of which the
    next ones continue with their likeliest value, or with more while no row has `number` sets. A row of inputs may hold
    values of `system.given` too.
    Raises `GraphError` for a system without intermediates, `RecordError` for a row that lacks an input and
    `ValueError` for parameters that do not belong to the system or a number below 1.
    """
    system.check_params(params)
    wanted = [node.name for node in system.intermediates]
    if not wanted:
        raise GraphError("the system has no intermediate values to draw: its preferences are for DirectObjective")
    if number < 1 or not inputs:
        raise ValueError(f"draw_intermediates: number {number} and the rows of inputs {len(inputs)} must be at least 1")
    require_inputs(system, inputs)
    sets: list[list[dict[str, Any]]] = [[dict(row)] for row in inputs]
    last = max(place for place, node in enumerate(system.nodes) if node.name in wanted)
    for node in system.nodes[: last + 1]:
        rows = list(chain.from_iterable(sets))
        # Final values are not drawn, and no intermediate depends on a tool that reads one.
        if any(parent not in rows[0] for parent in node.parents) or node in system.outputs:
            continue
        if node.deterministic:
            columns = {name: [row[name] for row in rows] for name in node.parents}
            with _naming(node.name):
                values = system.sample_node(node, {}, columns, key)
            for row, value in zip(rows, values, strict=True):
                row.setdefault(node.name, value)
            continue
        # Numbers that do not depend on how many distinct values each row has: nothing compiles anew.
        longest = max(map(len, sets))
        filled = rows + [rows[-1]] * (len(inputs) * longest - len(rows))
        columns = {name: [row[name] for row in filled] for name in node.parents}
        with _naming(node.name):
            found = system.node_candidates(node, params, columns, math.ceil(number / longest), key)
        longer = iter([{**row, node.name: value} for value in own] for row, own in zip(rows, found, strict=False))
        # The best of each first, then the second best of each.
        sets = [_by_turns([next(longer) for _ in kept])[:number] for kept in sets]
    return [[{name: row[name] for name in wanted} for row in kept] for kept in sets]


def sampled_batch(
    system: CompoundSystem,
    records: Sequence[PreferenceRecord],
    intermediates: Sequence[Sequence[Intermediates]],
    number: int,
    staleness: int = 0,
) -> SampledBatch:
    """The features of both sides with every distinct set of intermediates, padded to `number` sets a row.

    records: as `without_intermediates` returns them. staleness: steps since the policy drew the sets.
    Sets that no final value can be prepared with (a tool or a prompt refuses them) are left out.
    Raises `RecordError` as `prepare` does where a row keeps no set, and for a row with no set or more than `number`.
    """
    inner, outer = ([node.name for node in nodes] for nodes in (system.intermediates, system.outputs))
    kept = [distinct({name: y[name] for name in inner} for y in sets) for sets in intermediates]
    for row, sets in enumerate(kept):
        if not 1 <= len(sets) <= number:
            raise RecordError(f"row {row} has {len(sets)} distinct sets of intermediates, outside 1..{number}")

    def prepared(side: str, names: Sequence[str]) -> dict[str, Any]:
        rows = [
            {**record.inputs, **getattr(record, side), **y}
            for record, sets in zip(records, kept, strict=True)
            for y in [*sets, *[sets[0]] * (number - len(sets))]
        ]
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
        kept = [
            _usable(system, record, sets, row) for row, (record, sets) in enumerate(zip(records, kept, strict=True))
        ]
        features, outputs = both()
    return SampledBatch(
        intermediates=features,
        outputs=outputs,
        valid=np.arange(number) < np.array([[len(sets)] for sets in kept]),
        staleness=np.full(len(records), staleness, np.int32),
    )


def _usable(
    system: CompoundSystem, record: PreferenceRecord, sets: Sequence[Intermediates], row: int
) -> list[Intermediates]:
    """The sets that the record's final values can be prepared with. Raises `RecordError` where there is none."""
    usable, errors = [], []
    for y in sets:
        try:
            system.prepare([{**record.inputs, **side, **y} for side in (record.chosen, record.rejected)])
        except RecordError as error:
            errors.append(error)
        else:
            usable.append(y)
    if not usable:
        raise RecordError(
            f"row {row}: its final values cannot be prepared with any of its {len(sets)} sets of intermediates "
            f"(chosen is row 0, rejected row 1 in what follows): {errors[0]}"
        ) from errors[0]
    return usable


@contextmanager
def _naming(node: str) -> Iterator[None]:
    try:
        yield
    except RecordError as error:
        raise RecordError(f"node {node!r}: {error}") from error


def _by_turns(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]
