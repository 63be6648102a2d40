"""Rows that begin alike, as one sequence: their common tokens go through the dense layers once.

Sharing the prompt of both sides of a preference saves their computation (arXiv 2410.20305). Attention still sees whole
rows, without a mask, so that every kernel serves: queries, keys and values are laid out as rows for it alone.

A packed sequence is the prefix in S places, then the rest of each row in W places: [B, S + R W]. A row is [S + W].
Axes: B groups of rows, R rows of a group, S places of the prefix, W places of a row's rest, L = S + W, P = S + R W.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Packed = Shaped[Array, "groups packed ..."]
Rows = Shaped[Array, "rows length ..."]


class SharedPrefix(flax.struct.PyTreeNode):
    """How groups of rows are packed. Rows of a group follow each other.

    Attributes:
        lengths: int [B], how many tokens the rows of each group have in common, at most S.
        rows: R.
        room: S.
        rest: W, which the tokens behind the common ones fit in.
    """

    lengths: Int[Array, "groups"]
    rows: int = flax.struct.field(pytree_node=False)
    room: int = flax.struct.field(pytree_node=False)
    rest: int = flax.struct.field(pytree_node=False)

    @property
    def positions(self) -> Int[Array, "groups packed"]:
        """Where in its row each packed token stands."""
        groups = len(self.lengths)
        prefix = jnp.broadcast_to(jnp.arange(self.room), (groups, self.room))
        own = self.lengths[:, None] + jnp.tile(jnp.arange(self.rest), self.rows)
        return jnp.concatenate([prefix, own], axis=1)

    def collect(self, rows: Rows) -> Packed:
        """Of rows [B R, L, ...] the tokens of a packed sequence [B, P, ...]; those of the prefix from the first row."""
        return _collect(self.rows, self.room, self.rest, self.lengths, rows)

    def spread(self, packed: Packed) -> Rows:
        """The rows [B R, L, ...] of a packed sequence [B, P, ...]; a row's places behind its last token hold zeros."""
        return _spread(self.rows, self.room, self.rest, self.lengths, packed)

    def at(self, packed: Packed, places: Int[Array, "rows places"]) -> Shaped[Array, "rows places ..."]:
        """What stands in the rows [B R, L, ...] at the places [B R, C] that lie within them."""
        own = places.reshape(-1, self.rows, places.shape[-1])
        start = self.lengths[:, None, None]
        begin = self.room + self.rest * jnp.arange(self.rows)[:, None]
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


def _cut(rows: int, room: int, packed: Array) -> tuple[Array, Array]:
    """The inverse of `_joined`."""
    own = packed[:, room:]
    return packed[:, None, :room], own.reshape(len(own), rows, -1, *own.shape[2:])


def _padded(prefix: Array, rest: int) -> Array:
    return jnp.pad(prefix, [(0, 0), (0, 0), (0, rest), *((0, 0),) * (prefix.ndim - 3)])


# Written out, the gradients of these two linear maps move places as the maps do; those of a gather are scatters.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _collect(rows: int, room: int, rest: int, lengths: Array, x: Array) -> Array:
    grouped = _as_groups(rows, x)
    return _joined(_prefix(lengths, grouped[:, :1, :room]), _moved(grouped, lengths, rest))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _spread(rows: int, room: int, rest: int, lengths: Array, packed: Array) -> Array:
    prefix, own = _cut(rows, room, packed)
    return _as_rows(_padded(_prefix(lengths, prefix), rest) + _moved(own, -lengths, room + rest))


def _collect_transposed(rows: int, room: int, rest: int, lengths: Array, packed: Array) -> tuple[None, Array]:
    prefix, own = _cut(rows, room, packed)
    first = (jnp.arange(rows) == 0).reshape(1, -1, *(1,) * (own.ndim - 2))
    shared = jnp.where(first, _padded(_prefix(lengths, prefix), rest), 0)
    return None, _as_rows(shared + _moved(own, -lengths, room + rest))


def _spread_transposed(rows: int, room: int, rest: int, lengths: Array, x: Array) -> tuple[None, Array]:
    grouped = _as_groups(rows, x)
    prefix = _prefix(lengths, grouped[:, :, :room]).sum(1, keepdims=True)
    return None, _joined(prefix, _moved(grouped, lengths, rest))


_collect.defvjp(lambda rows, room, rest, lengths, x: (_collect(rows, room, rest, lengths, x), lengths), _collect_transposed)
_spread.defvjp(lambda rows, room, rest, lengths, x: (_spread(rows, room, rest, lengths, x), lengths), _spread_transposed)
