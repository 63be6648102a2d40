"""What frozen parts make of raw features, on the host: equal rows once, in slices of few sizes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from sysdpo_jax.components.base import Component
from sysdpo_jax.typing import Features, Params


def encode_together(component: Component, params: Params, sides: Sequence[Features]) -> list[Features]:
    """Features of each of several trees, as `Component.encode` makes them; NumPy in, NumPy out.

    What is equal among all their rows, in an entry that `Component.raw` names, is encoded once. Everything else comes
    back as the very arrays that it is.

    Args:
        component: what the features are of.
        params: a tree that holds its frozen entries, on devices that this process alone can compute with.
        sides: feature trees, whatever axes lie before those of a row.
    """
    raw = [component.raw(features) for features in sides]
    names = list(dict.fromkeys(name for own in raw for name in own))
    made = [
        {name: entry for name, entry in side.items() if name not in own} if own else side
        for side, own in zip(sides, raw, strict=True)
    ]
    frozen = {name: params[name] for name in component.frozen} if names else {}
    for name in names:
        entries = {place: _flat(sides[place][name], own[name].leading) for place, own in enumerate(raw) if name in own}
        for places in _alike(entries):
            rows = raw[places[0]][name].rows
            encode = partial(_encode, component, name, frozen)
            whole = _each_once(encode, [entries[place] for place in places], rows)
            for place, entry in zip(places, whole, strict=True):
                axes = np.shape(jax.tree.leaves(sides[place][name])[0])[: raw[place][name].leading]
                made[place] |= jax.tree.map(lambda x, axes=axes: x.reshape(*axes, *x.shape[1:]), entry)
    return made


def in_slices(function: Callable[[PyTree], PyTree], tree: PyTree, rows: Sequence[int], at_once: int) -> PyTree:
    """`function` of these rows of a tree, as NumPy arrays: so many at once that memory is bounded.

    A slice that is not full is filled up to a power of two, so that few shapes are compiled.
    """
    if not rows:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree)
        shapes = jax.eval_shape(function, one)
        return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
    whole: PyTree = None
    for start in range(0, len(rows), at_once):
        own = list(rows[start : start + at_once])
        size = min(2 ** (len(own) - 1).bit_length(), at_once)
        filled = own + own[-1:] * (size - len(own))
        part = jax.tree.map(np.asarray, function(jax.tree.map(lambda x, filled=filled: x[filled], tree)))
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((len(rows), *x.shape[1:]), x.dtype), part)
        for target, made in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            target[start : start + len(own)] = made[: len(own)]
    return whole


def _each_once(function: Callable[[PyTree], PyTree], trees: Sequence[PyTree], at_once: int) -> list[PyTree]:
    """`function` of the rows of each tree; of equal rows, among all of them, once."""
    kinds: dict[bytes, int] = {}
    firsts: list[list[int]] = []
    inverse: list[np.ndarray] = []
    for tree in trees:
        known, leaves = len(kinds), jax.tree.leaves(tree)
        rows = (b"".join(leaf[row].tobytes() for leaf in leaves) for row in range(len(leaves[0])))
        own = [kinds.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(kinds)) for row in rows]
        inverse.append(np.array(own, np.int64))
        # A row is the first of its kind where the number of its kind is one higher than all before it.
        highest = np.maximum.accumulate([known - 1, *own])
        firsts.append(np.flatnonzero(np.diff(highest)).tolist())
    # Trees without a row of their own have nothing to add, but for the shapes where there is no other.
    new = [(tree, rows) for tree, rows in zip(trees, firsts, strict=True) if rows] or [(trees[0], [])]
    parts = [in_slices(function, tree, rows, at_once) for tree, rows in new]
    whole = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return [jax.tree.map(lambda x, rows=rows: _spread(x, rows), whole) for rows in inverse]


def _spread(made: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The kind of each row. One row for all, as the null condition is, stays one row in memory."""
    if len(made) == 1:
        return np.broadcast_to(made, (len(rows), *made.shape[1:]))
    return made if len(rows) == len(made) and (rows == np.arange(len(rows))).all() else made[rows]


def _flat(entry: PyTree, leading: int) -> PyTree:
    """With one axis in the place of those before the rows' own."""
    return jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[leading:])), entry)


def _alike(entries: Mapping[int, PyTree]) -> list[list[int]]:
    """The places of entries whose rows have the same shapes."""
    groups: dict[Any, list[int]] = {}
    for place, entry in entries.items():
        leaves, structure = jax.tree.flatten(entry)
        groups.setdefault((structure, *((x.shape[1:], x.dtype) for x in leaves)), []).append(place)
    return list(groups.values())


@partial(jax.jit, static_argnums=(0, 1))
def _encode(component: Component, name: str, params: Params, entry: PyTree) -> Features:
    return component.encode(params, {name: entry})
