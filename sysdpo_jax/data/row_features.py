"""The features of one record at their own sizes, as they are kept, and many of them put together to a batch.

Of a node that does not run in every record the runs that there are are kept: {"ran": which, "runs": features or None}.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sysdpo_jax.components.routed import Routed, only_runs, spread
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.typing import Features

RAN, RUNS = "ran", "runs"


def at_own_size(node: Node, row: Features) -> tuple[Any, dict[str, int]]:
    """What is kept of features [1, ...], without the leading axis, and its sizes by axis; none where nothing ran."""
    runs = None if isinstance(row, Routed) and not np.any(row.ran) else only_runs(row)
    fit = {} if runs is None else {axis: int(np.max(x)) for axis, x in node.component.sizes(runs).items()}
    fitted = None if runs is None else node.component.resize(runs, fit)
    if isinstance(row, Routed):
        return {RAN: np.asarray(row.ran)[0], RUNS: fitted}, fit
    return jax.tree.map(lambda x: x[0], fitted), fit


def stacked(node: Node, rows: Sequence[Any], sizes: Mapping[str, int], routed: bool, example: Any) -> Features:
    """The batch of rows of one node at these sizes. example: of the node's kept features, for rows that never ran."""
    resize = node.component.resize
    if not routed:
        parts = [resize(jax.tree.map(lambda x: x[None], row), sizes) for row in rows]
        return _joined(parts)
    ran = np.stack([row[RAN] for row in rows])
    parts = [resize(row[RUNS], sizes) for row in rows if row[RUNS] is not None]
    if not parts and example is not None:
        # Nothing is made of these numbers, but the step computes some whatever ran.
        blank = jax.tree.map(np.zeros_like, example) if node.component.sizes(example) else example
        one = jax.tree.map(lambda x: x[:1], resize(blank, sizes))
        return Routed(jax.tree.map(lambda x: np.broadcast_to(x[0], (*ran.shape, *x.shape[1:])), one), ran)
    return Routed(spread(_joined(parts), ran) if parts else None, ran)


def routed_nodes(system: CompoundSystem) -> list[str]:
    """The generative nodes that do not run once in every record."""
    return [node.name for node in system.nodes if system.is_routed(node) and node.has_params]


def runs_of(row: Any) -> int:
    """How many runs there are in the kept features of a node that does not run in every record."""
    return int(np.sum(row[RAN]))


def kind(system: CompoundSystem, sides: Sequence[Mapping[str, Any]]) -> str:
    """The shapes of what cannot be padded, by node and side; null where nothing ran. See `merged`."""
    return json.dumps([_shapes(system, node, side[node.name]) for node in system.nodes for side in sides])


def merged(kinds: Sequence[str], rows: Sequence[int]) -> list[int]:
    """The number of the batches that each kind may be in: what did not run fits with whatever did.

    rows: how many there are of each kind, of which the largest ones find together first.
    """
    totals = Counter[str]()
    for own, number in zip(kinds, rows, strict=True):
        totals[own] += number
    groups: list[list[Any]] = []
    places: dict[str, int] = {}
    for own, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        shapes = json.loads(own) if own else []
        place = next((place for place, group in enumerate(groups) if _fit(group, shapes)), len(groups))
        if place == len(groups):
            groups.append(shapes)
        else:
            groups[place] = [known if new is None else new for known, new in zip(groups[place], shapes, strict=True)]
        places[own] = place
    return [places[own] for own in kinds]


def _fit(group: Sequence[Any], shapes: Sequence[Any]) -> bool:
    pairs = zip(group, shapes, strict=False)
    return len(group) == len(shapes) and all(a is None or b is None or a == b for a, b in pairs)


def _shapes(system: CompoundSystem, node: Node, row: Any) -> Any:
    routed = system.is_routed(node) and node.has_params
    features = row[RUNS] if routed else row
    if features is None:
        return None
    if node.component.sizes(features):
        return []
    return [x.shape[1:] if routed else x.shape for x in jax.tree.leaves(features)]


def _joined(parts: Sequence[Features]) -> Features:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
