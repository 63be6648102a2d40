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


class Sizes(NamedTuple):
    """Of packed sequences and their rows.

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


class SharedPrefix(flax.struct.PyTreeNode):
    """How groups of rows are packed.

    Attributes:
        lengths: int [B], how many tokens the rows of each group have in common.
        sizes: Static.
    """

    lengths: Int[Array, "groups"]
    sizes: Sizes = flax.struct.field(pytree_node=False)

    @property
    def positions(self) -> Int[Array, "groups packed"]:
        """Where in its row each packed token stands."""
        groups, sizes = len(self.lengths), self.sizes
        prefix = jnp.broadcast_to(jnp.arange(sizes.prefix), (groups, sizes.prefix))
        own = self.lengths[:, None] + jnp.tile(jnp.arange(sizes.suffix), sizes.rows)
        return jnp.concatenate([prefix, own], axis=1)

    def pack(self, rows: Rows) -> Packed:
        """Of rows [B R, L, ...] the tokens of a packed sequence [B, P, ...]; those of the prefix from the first row."""
        return _pack(self.sizes, self.lengths, rows)

    def unpack(self, packed: Packed) -> Rows:
        """The rows [B R, L, ...] of a packed sequence [B, P, ...]; a row's places behind its last token hold zeros."""
        return _unpack(self.sizes, self.lengths, packed)

    def at(self, packed: Packed, places: Int[Array, "rows places"]) -> Shaped[Array, "rows places ..."]:
        """What stands in the rows [B R, L, ...] at the places [B R, C] that lie within them."""
        own = places.reshape(-1, self.sizes.rows, places.shape[-1])
        start = self.lengths[:, None, None]
        begin = self.sizes.prefix + self.sizes.suffix * jnp.arange(self.sizes.rows)[:, None]
        slots = jnp.where(own < start, own, begin + own - start).reshape(len(self.lengths), -1)
        picked = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(packed, slots)
        return picked.reshape(*places.shape, *packed.shape[2:])


def _moved(x: Array, start: Array, length: int) -> Array:
    """[B, R, N, ...] -> [B, R, length, ...]: place j holds what was at j + start [B], zeros outside."""
    places = start[:, None] + jnp.arange(length)
    found = jax.vmap(partial(jnp.take, axis=1, mode="clip"))(x, places)
    inside = (places >= 0) & (places < x.shape[2])
    return jnp.where(_beside(inside, found), found, 0)


def _beside(mask: Array, x: Array) -> Array:
    """A mask [B, L] beside x [B, R, L, ...]."""
    return mask.reshape(len(mask), 1, -1, *(1,) * (x.ndim - 3))


def _prefix(lengths: Array, x: Array) -> Array:
    """x [B, R, N, ...] without what lies behind the prefix."""
    return jnp.where(_beside(jnp.arange(x.shape[2]) < lengths[:, None], x), x, 0)


def _as_groups(rows: int, x: Array) -> Array:
    return x.reshape(-1, rows, *x.shape[1:])


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _joined(prefix: Array, own: Array) -> Array:
    """[B, 1, S, ...] and [B, R, W, ...] as [B, P, ...]."""
    return jnp.concatenate([prefix[:, 0], own.reshape(len(own), -1, *own.shape[3:])], axis=1)


def _cut(sizes: Sizes, packed: Array) -> tuple[Array, Array]:
    """The inverse of `_joined`."""
    own = packed[:, sizes.prefix :]
    return packed[:, None, : sizes.prefix], own.reshape(len(own), sizes.rows, -1, *own.shape[2:])


def _padded(sizes: Sizes, prefix: Array) -> Array:
    return jnp.pad(prefix, [(0, 0), (0, 0), (0, sizes.length - sizes.prefix), *((0, 0),) * (prefix.ndim - 3)])


# Written out, the gradients of these two linear maps move places as the maps do; those of a gather are scatters.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pack(sizes: Sizes, lengths: Array, rows: Array) -> Array:
    grouped = _as_groups(sizes.rows, rows)
    return _joined(_prefix(lengths, grouped[:, :1, : sizes.prefix]), _moved(grouped, lengths, sizes.suffix))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpack(sizes: Sizes, lengths: Array, packed: Array) -> Array:
    prefix, own = _cut(sizes, packed)
    return _as_rows(_padded(sizes, _prefix(lengths, prefix)) + _moved(own, -lengths, sizes.length))


def _pack_transposed(sizes: Sizes, lengths: Array, packed: Array) -> tuple[None, Array]:
    prefix, own = _cut(sizes, packed)
    first = (jnp.arange(sizes.rows) == 0).reshape(1, -1, *(1,) * (own.ndim - 2))
    shared = jnp.where(first, _padded(sizes, _prefix(lengths, prefix)), 0)
    return None, _as_rows(shared + _moved(own, -lengths, sizes.length))


def _unpack_transposed(sizes: Sizes, lengths: Array, rows: Array) -> tuple[None, Array]:
    grouped = _as_groups(sizes.rows, rows)
    prefix = _prefix(lengths, grouped[:, :, : sizes.prefix]).sum(1, keepdims=True)
    return None, _joined(prefix, _moved(grouped, lengths, sizes.suffix))


_pack.defvjp(lambda sizes, lengths, rows: (_pack(sizes, lengths, rows), lengths), _pack_transposed)
_unpack.defvjp(lambda sizes, lengths, packed: (_unpack(sizes, lengths, packed), lengths), _unpack_transposed)
