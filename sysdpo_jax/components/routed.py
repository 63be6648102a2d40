"""Features of nodes that do not run in every row: the runs that there were are computed, the others are not.

A node of a branch has 0 or 1 runs in a record, a node of a loop as many as the record has turns.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from sysdpo_jax.components.base import Component, as_rows
from sysdpo_jax.typing import Features

# `room` is one of so many sizes, so that few are compiled.
LEVELS = 8
# The mesh axes that cut a batch's rows.
BATCH_AXES = ("data", "fsdp")


@partial(jax.tree_util.register_dataclass, data_fields=("features", "ran"), meta_fields=("room", "parts"))
@dataclass(frozen=True)
class Routed:
    """Features of places, some of which have a run.

    Args:
        features: Every array [*leading, ...]; what a place without a run holds is arbitrary. None where no run is.
        ran: [*leading], which places have one: leading is (batch,) of a branch and (batch, turns) of a loop.
        room: So many places are computed, in the whole batch with both sides, which is no less than there are runs.
            None computes as many as there are places.
        parts: Where the step cuts the batch into so many parts, none of them has more runs than its share of the room.
    """

    features: Features
    # Bool [*leading]; no more is said, because JAX puts other things in its place, such as shapes.
    ran: Any
    room: int | None = None
    parts: int = 1


def of_part(batch: PyTree, parts: int) -> PyTree:
    """A part of a batch that is cut into so many, with the room that it takes.

    A batch whose room was not chosen for these parts may have all its runs in one of them.
    """

    def with_own_room(leaf: Any) -> Any:
        known = isinstance(leaf, Routed) and leaf.room is not None and leaf.parts == parts
        return replace(leaf, room=leaf.room // parts, parts=1) if known else leaf

    return jax.tree.map(with_own_room, batch, is_leaf=lambda leaf: isinstance(leaf, Routed))


def room_for(runs: int, places: int) -> int:
    """The room for so many runs in a batch of so many places: one of a few sizes, at least 1."""
    step = -(-places // LEVELS)
    return min(places, step * max(1, -(-runs // step)))


def only_runs(features: Features) -> Features:
    """The features of the runs alone [runs, ...], None where nothing ran; others as they are. Host side."""
    if not isinstance(features, Routed):
        return features
    ran = np.asarray(features.ran)
    return jax.tree.map(lambda x: np.asarray(x)[ran], features.features)


def spread(features: Features, ran: Bool[np.ndarray, "..."]) -> Features:
    """Features [runs, ...] at the places [*leading, ...] that ran; zeros at the others. Host side."""

    def placed(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((*ran.shape, *x.shape[1:]), x.dtype)
        whole[ran] = x
        return whole

    return jax.tree.map(placed, features)


def fold(component: Component, features: Features, axes: int) -> Features:
    """`Component.fold_runs`, which of `Routed` features folds the places: what rows share is not made use of."""
    return as_rows(features, axes) if isinstance(features, Routed) else component.fold_runs(features, axes)


def compacted(routed: Routed) -> tuple[Features, Int[Array, "room"], Int[Array, "room"]]:
    """The features of the runs, as many as there is room for; the rest of it is filled with the first run.

    Returns:
        features [room, ...]; source: the number of each one's place among all [room]; target: the same, and the number
        of all places for what fills.
    """
    places, axes = math.prod(routed.ran.shape), routed.ran.ndim
    size = places if routed.room is None else min(places, _whole(routed.room))
    [target] = jnp.nonzero(routed.ran.reshape(-1), size=size, fill_value=places)
    # A run's own values: whatever a place without one holds could have a gradient that is not finite.
    source = jnp.minimum(jnp.where(target < places, target, target[0]), places - 1)
    rows = as_rows(jax.tree.map(jnp.asarray, routed.features), axes)
    return jax.tree.map(lambda x: _cut(x[source]), rows), source, target


def summed(values: Array, target: Int[Array, "room"], ran: Bool[Array | np.ndarray, "rows ..."]) -> Array:
    """Values of what `compacted` gave, added up for every row; NaN where there was no room for all runs.

    That is of batches which were joined behind the back of what chose their room: the step refuses it.
    """
    flat = jnp.zeros(math.prod(ran.shape), values.dtype).at[target].set(values, mode="drop")
    rows = flat.reshape(ran.shape[0], -1).sum(-1)
    return jnp.where(ran.sum() > len(target), jnp.nan, rows)


def number_of_runs(features: Features, rows: Array) -> Array:
    """How many runs each row has, as floats like `rows`: 1 where the node runs in every row."""
    if not isinstance(features, Routed):
        return jnp.ones_like(rows)
    return jnp.asarray(features.ran).reshape(features.ran.shape[0], -1).sum(-1).astype(jnp.result_type(rows))


def _whole(room: int) -> int:
    """The room, as a multiple of the parts that the mesh of the function being traced cuts rows into."""
    return -(-room // _parts()) * _parts()


def _cut(rows: Array) -> Array:
    """Rows that are cut over the mesh as those of a batch are: each device computes its share."""
    cut = _parts() > 1 and rows.shape[0] % _parts() == 0
    return jax.lax.with_sharding_constraint(rows, PartitionSpec(BATCH_AXES)) if cut else rows


def _parts() -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in BATCH_AXES)
