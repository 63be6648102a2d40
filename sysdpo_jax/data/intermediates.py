"""The intermediates of SysDPO-Sampling: drawn from a policy, and joined to preferences on final values."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import RecordError, distinct
from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.objectives.log_ratio import PairBatch, SampledBatch
from sysdpo_jax.typing import Params, Record

# A value for every intermediate node of one run.
Intermediates = Mapping[str, Any]


def draw_intermediates(
    system: CompoundSystem, params: Params, inputs: Sequence[Record], number: int, key: PRNGKeyArray
) -> list[list[dict[str, Any]]]:
    """From 1 to `number` distinct likely sets `{intermediate node: value}` for every row of inputs.

    The first node spreads into `number` candidates (a language model's by its diverse beam search), each of which the
    next ones continue with their likeliest value, or with more while there are fewer than `number` sets.
    Raises `GraphError` for a system without intermediates.
    """
    wanted = [node.name for node in system.intermediates]
    if not wanted:
        raise GraphError("the system has no intermediate values to draw: its preferences are for DirectObjective")
    sets: list[list[dict[str, Any]]] = [[dict(row)] for row in inputs]
    last = max(place for place, node in enumerate(system.nodes) if node.name in wanted)
    for node in system.nodes[: last + 1]:
        if not (node.deterministic or node.name in wanted):
            continue
        rows = list(chain.from_iterable(sets))
        if any(parent not in rows[0] for parent in node.parents):
            # A tool that reads final values: no intermediate depends on it.
            continue
        columns = {name: [row[name] for row in rows] for name in node.parents}
        if node.deterministic:
            found = [[value] for value in system.sample_node(node, {}, columns, key)]
        else:
            share = math.ceil(number / min(map(len, sets)))
            found = system.node_candidates(node, params, columns, share, key)
        longer = iter([{**row, node.name: value} for value in values] for row, values in zip(rows, found, strict=True))
        # The best of each first, then the second best of each.
        sets = [_by_turns([next(longer) for _ in kept])[:number] for kept in sets]
    return [[{name: row[name] for name in wanted} for row in kept] for kept in sets]


def sampled_batch(
    system: CompoundSystem,
    records: Sequence[PreferenceRecord],
    intermediates: Sequence[Sequence[Intermediates]],
    number: int,
    staleness: Sequence[int] | None = None,
) -> SampledBatch:
    """The features of both sides with every distinct set of intermediates, padded to `number` sets a row.

    records: without intermediates. staleness: steps since each row's were drawn, 0 by default.
    Raises `RecordError` as `prepare` does, and for a row without a set or with more than `number`.
    """
    kept = [distinct(sets) for sets in intermediates]
    for row, sets in enumerate(kept):
        if not 1 <= len(sets) <= number:
            raise RecordError(f"row {row} has {len(sets)} distinct sets of intermediates, outside 1..{number}")
    filled = [[*sets, *[sets[0]] * (number - len(sets))] for sets in kept]
    inner, outer = ([node.name for node in nodes] for nodes in (system.intermediates, system.outputs))

    def prepared(side: str, names: Sequence[str]) -> dict[str, Any]:
        rows = [
            {**record.inputs, **y, **{name: getattr(record, side)[name] for name in outer}}
            for record, sets in zip(records, filled, strict=True)
            for y in sets
        ]
        try:
            features = system.prepare(rows, names)
        except RecordError as error:
            raise RecordError(f"{side} runs (rows count intermediates, {number} a record): {error}") from error
        return jax.tree.map(lambda x: np.reshape(x, (len(records), number, *x.shape[1:])), features)

    return SampledBatch(
        intermediates=prepared("chosen", inner),
        outputs=PairBatch(prepared("chosen", outer), prepared("rejected", outer)),
        valid=np.arange(number) < np.array([[len(sets)] for sets in kept]),
        staleness=np.asarray([0] * len(records) if staleness is None else staleness, np.int32),
    )


def _by_turns(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]
