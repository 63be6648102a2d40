"""Rows that begin alike, as one sequence: their common tokens go through the dense layers once.

Sharing the prompt of both sides of a preference saves their computation (arXiv 2410.20305). Attention still sees whole
rows, without a mask, so that every kernel serves: queries, keys and values are laid out as rows for it alone.

A packed sequence is the prefix in S places, then what is a row's own in W places each, so that P = S + R W.
Axes: B groups of rows, R rows of a group, L length of a row, S places of the prefix, W of a row's own.
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
    """Of packed sequences and their rows, and where in these things stand.

    Attributes:
        rows: R, of a group; they follow each other.
        prefix: S, the room for what the rows of a group have in common; at most L.
        suffix: W, which what stands behind it in a row fits in.
        length: L, which all of a row fits in.
    """

    rows: int
    prefix: int
    suffix: int
    length: int

    def slots(self, lengths: Lengths, places: Int[Array, "#groups rows places"]) -> Int[Array, "groups rows places"]:
        """Where in a packed sequence stands what is at places of the group's rows; P for those behind a row's end."""
        own = places - lengths[:, None, None]
        first = self.prefix + self.suffix * jnp.arange(self.rows)[:, None]
        end = self.prefix + self.suffix * self.rows
        return jnp.where(own < 0, places, jnp.where(own < self.suffix, first + own, end))

    def all_slots(self, lengths: Lengths) -> Int[Array, "groups rows length"]:
        """`slots` of all places."""
        return self.slots(lengths, jnp.broadcast_to(jnp.arange(self.length), (1, self.rows, self.length)))

    def prefixes(self, lengths: Lengths) -> Int[Array, "groups rows prefix"]:
        """Where in a group's rows, one after the other, stands each one's prefix; R L behind that."""
        return self._in_rows(jnp.arange(self.prefix), jnp.arange(self.prefix) < lengths[:, None, None])

    def suffixes(self, lengths: Lengths) -> Int[Array, "groups own"]:
        """Where in a group's rows, one after the other, stands what is each one's own; R L behind the rows' ends."""
        places = lengths[:, None, None] + jnp.arange(self.suffix)
        return self._in_rows(places, places < self.length).reshape(len(lengths), -1)

    def _in_rows(self, places: Array, inside: Array) -> Array:
        return jnp.where(inside, places + self.length * jnp.arange(self.rows)[:, None], self.rows * self.length)


class SharedPrefix(flax.struct.PyTreeNode):
    """How groups of rows are packed.

    Attributes:
        lengths: int [B], how many tokens the rows of each group have in common.
        sizes: Static.
    """

    lengths: Lengths
    sizes: Sizes = flax.struct.field(pytree_node=False)

    def pack(self, rows: Rows) -> Packed:
        """Of rows [B R, L, ...] the tokens of a packed sequence [B, P, ...]; those of the prefix from the first row."""
        return _pack(self.sizes, self.lengths, rows)

    def unpack(self, packed: Packed) -> Rows:
        """The rows [B R, L, ...] of a packed sequence [B, P, ...]; a row's places behind its last token hold zeros."""
        return _unpack(self.sizes, self.lengths, packed)

    def at(self, packed: Packed, places: Int[Array, "rows places"]) -> Shaped[Array, "rows places ..."]:
        """What stands in the rows [B R, L, ...] at the places [B R, C] that lie within them."""
        grouped = places.reshape(-1, self.sizes.rows, places.shape[-1])
        slots = self.sizes.slots(self.lengths, grouped).reshape(len(self.lengths), -1)
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
def _pack(sizes: Sizes, lengths: Array, rows: Array) -> Array:
    places = jnp.concatenate([sizes.prefixes(lengths)[:, 0], sizes.suffixes(lengths)], axis=1)
    return _taken(_grouped(sizes, rows), places)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpack(sizes: Sizes, lengths: Array, packed: Array) -> Array:
    return _as_rows(_taken(packed, sizes.all_slots(lengths)))


def _pack_transposed(sizes: Sizes, lengths: Array, packed: Array) -> tuple[None, Array]:
    slots = sizes.all_slots(lengths)
    # The prefix comes from the first row alone.
    unread = (jnp.arange(sizes.rows)[:, None] > 0) & (slots < sizes.prefix)
    return None, _as_rows(_taken(packed, jnp.where(unread, packed.shape[1], slots)))


def _unpack_transposed(sizes: Sizes, lengths: Array, rows: Array) -> tuple[None, Array]:
    grouped = _grouped(sizes, rows)
    prefix = _taken(grouped, sizes.prefixes(lengths)).sum(1)
    return None, jnp.concatenate([prefix, _taken(grouped, sizes.suffixes(lengths))], axis=1)


_pack.defvjp(lambda sizes, lengths, rows: (_pack(sizes, lengths, rows), lengths), _pack_transposed)
_unpack.defvjp(lambda sizes, lengths, packed: (_unpack(sizes, lengths, packed), lengths), _unpack_transposed)
