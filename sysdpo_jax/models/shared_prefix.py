"""Rows that begin alike, as one sequence: their common tokens go through the dense layers once.

Sharing the prompt of both sides of a preference saves their computation (arXiv 2410.20305). Attention still sees whole
rows, without a mask, so that every kernel serves: queries, keys and values are laid out as rows for it alone.

A packed sequence is the prefix in S places, then the rest of each row in W places, so that P = S + R W.
Axes: B groups of rows, R rows of a group, L length of a row, S places of the prefix, W places of a row's rest.
"""

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Packed = Shaped[Array, "groups packed ..."]
Rows = Shaped[Array, "rows length ..."]
Lengths = Int[Array, "groups"]


class Sizes(NamedTuple):
    """Those of a `SharedPrefix`, and where in its arrays things stand."""

    rows: int
    room: int
    rest: int
    length: int

    def slots(self, lengths: Lengths, places: Int[Array, "#groups rows places"]) -> Int[Array, "groups rows places"]:
        """Where in a packed sequence stands what is at places of the group's rows; P for those behind a row's end."""
        own = places - lengths[:, None, None]
        first = self.room + self.rest * jnp.arange(self.rows)[:, None]
        end = self.room + self.rest * self.rows
        return jnp.where(own < 0, places, jnp.where(own < self.rest, first + own, end))

    def all_slots(self, lengths: Lengths) -> Int[Array, "groups rows length"]:
        """`slots` of all places."""
        return self.slots(lengths, jnp.broadcast_to(jnp.arange(self.length), (1, self.rows, self.length)))

    def prefixes(self, lengths: Lengths) -> Int[Array, "groups rows room"]:
        """Where in a group's rows, one after the other, stands each one's prefix; R L behind that."""
        return self._in_rows(jnp.arange(self.room), jnp.arange(self.room) < lengths[:, None, None])

    def rests(self, lengths: Lengths) -> Int[Array, "groups own"]:
        """Where in a group's rows, one after the other, stands the rest of each; R L behind the rows' ends."""
        places = lengths[:, None, None] + jnp.arange(self.rest)
        return self._in_rows(places, places < self.length).reshape(len(lengths), -1)

    def _in_rows(self, places: Array, inside: Array) -> Array:
        return jnp.where(inside, places + self.length * jnp.arange(self.rows)[:, None], self.rows * self.length)


class SharedPrefix(flax.struct.PyTreeNode):
    """How groups of rows are packed. Rows of a group follow each other.

    Attributes:
        lengths: int [B], how many tokens the rows of each group have in common, at most S.
        rows: R.
        room: S.
        rest: W, which the tokens behind the common ones fit in.
        length: L, which all tokens of a row fit in; at least S.
    """

    lengths: Lengths
    rows: int = flax.struct.field(pytree_node=False)
    room: int = flax.struct.field(pytree_node=False)
    rest: int = flax.struct.field(pytree_node=False)
    length: int = flax.struct.field(pytree_node=False)

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.rows, self.room, self.rest, self.length)

    def collect(self, rows: Rows) -> Packed:
        """Of rows [B R, L, ...] the tokens of a packed sequence [B, P, ...]; those of the prefix from the first row."""
        return _collect(self._sizes, self.lengths, rows)

    def spread(self, packed: Packed) -> Rows:
        """The rows [B R, L, ...] of a packed sequence [B, P, ...]; a row's places behind its last token hold zeros."""
        return _spread(self._sizes, self.lengths, packed)

    def at(self, packed: Packed, places: Int[Array, "rows places"]) -> Shaped[Array, "rows places ..."]:
        """What stands in the rows [B R, L, ...] at the places [B R, C] that lie within them."""
        grouped = places.reshape(-1, self.rows, places.shape[-1])
        slots = self._sizes.slots(self.lengths, grouped).reshape(len(self.lengths), -1)
        picked = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(packed, slots)
        return picked.reshape(*places.shape, *packed.shape[2:])


def _taken(x: Shaped[Array, "groups slots ..."], places: Int[Array, "groups ..."]) -> Shaped[Array, "groups ..."]:
    """What stands at the places; zeros for those behind the end.

    It is a gather that fills, not one under a mask: JAX would take the mask's zeros, alike in all layers, out of the
    loop over layers, and each layer would read them like any array.
    """
    return jax.vmap(partial(jnp.take, axis=0, mode="fill", fill_value=0))(x, places)


def _grouped(sizes: Sizes, rows: Array) -> Array:
    """[B R, L, ...] as [B, R L, ...]."""
    return rows.reshape(-1, sizes.rows * sizes.length, *rows.shape[2:])


def _as_rows(x: Array) -> Array:
    """[B, R, L, ...] as [B R, L, ...]."""
    return x.reshape(-1, *x.shape[2:])


# Written out, the gradients of these two linear maps are gathers as the maps are; those of a gather are scatters.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(sizes: Sizes, lengths: Array, rows: Array) -> Array:
    places = jnp.concatenate([sizes.prefixes(lengths)[:, 0], sizes.rests(lengths)], axis=1)
    return _taken(_grouped(sizes, rows), places)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(sizes: Sizes, lengths: Array, packed: Array) -> Array:
    return _as_rows(_taken(packed, sizes.all_slots(lengths)))


def _collect_transposed(sizes: Sizes, lengths: Array, packed: Array) -> tuple[None, Array]:
    slots = sizes.all_slots(lengths)
    # The prefix comes from the first row alone.
    unread = (jnp.arange(sizes.rows)[:, None] > 0) & (slots < sizes.room)
    return None, _as_rows(_taken(packed, jnp.where(unread, packed.shape[1], slots)))


def _spread_transposed(sizes: Sizes, lengths: Array, rows: Array) -> tuple[None, Array]:
    grouped = _grouped(sizes, rows)
    prefix = _taken(grouped, sizes.prefixes(lengths)).sum(1)
    return None, jnp.concatenate([prefix, _taken(grouped, sizes.rests(lengths))], axis=1)


_collect.defvjp(lambda sizes, lengths, rows: (_collect(sizes, lengths, rows), lengths), _collect_transposed)
_spread.defvjp(lambda sizes, lengths, packed: (_spread(sizes, lengths, packed), lengths), _spread_transposed)
