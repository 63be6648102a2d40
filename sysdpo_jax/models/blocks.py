"""Attention on CPUs block by block: the scores of one block stay in the cache, and the backward pass makes them again.

A matrix of scores [B, H, L, S] written to memory and read back by every pass costs several times what its products do.
A block is some rows and some of their queries with all slots, so that its softmax is complete.
Axes: B batch, L length, S slots, H heads, G key-value heads, R = H / G, K head width; b rows and l queries of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sysdpo_jax.models.attention_request import Queries, Slots

# Scores of a block, 2 MiB in float32: a few such arrays are at work at once, in the 1 to 2 MiB a core has beside it.
BLOCK = 2**19

BlockQueries = Float[Array, "b G Rl K"]
BlockSlots = Float[Array, "b G K S"]
BlockMask = Bool[Array, "#b 1 1 l S"] | None


def blockwise(
    queries: Queries,
    keys: Slots,
    values: Slots,
    visible: Bool[Array, "batch length slots"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Queries:
    """As `attention.attend`; the scale is multiplied into the queries.

    Blocks differ by at most a row and a query from equal parts; what is added to make them equal is cut off again.
    """
    batch, length, heads, width = queries.shape
    slots, groups = keys.shape[1:3]
    rows = _part(batch, heads * length * slots)
    chunk = length if rows > 1 else _part(length, heads * slots)
    blocks = -(-batch // rows), -(-length // chunk)
    pad = partial(_padded, rows=blocks[0] * rows)
    # The head width before the slots: each product then reads and writes its large operand as it lies.
    sides = [pad(x).reshape(-1, rows, *x.shape[1:]).transpose(0, 1, 3, 4, 2) for x in (keys, values)]
    split = _padded((queries * scale).astype(queries.dtype), blocks[0] * rows, blocks[1] * chunk)
    split = split.reshape(blocks[0], rows, blocks[1], chunk, groups, -1, width).transpose(0, 2, 1, 4, 5, 3, 6)
    stacked = split.reshape(*blocks, rows, groups, -1, width)
    masks = None
    if visible is not None:
        masks = _padded(visible, blocks[0] * rows, blocks[1] * chunk)
        masks = masks.reshape(blocks[0], rows, blocks[1], chunk, slots).swapaxes(1, 2)

    def of_rows(row: tuple[Array, Array, Array, Array | None]) -> Array:
        own_queries, own_keys, own_values, own_masks = row

        def of_queries(part: tuple[Array, Array, Array | None]) -> Array:
            number, some, mask = part
            if causal:
                behind = number * chunk + jnp.arange(chunk)[:, None] - jnp.arange(slots)
                seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
                mask = seen[None] if mask is None else seen & mask
            return _block(softcap, some, own_keys, own_values, None if mask is None else mask[:, None, None])

        return jax.lax.map(of_queries, (jnp.arange(blocks[1]), own_queries, own_masks))

    mixed = jax.lax.map(of_rows, (stacked, *sides, masks))
    mixed = mixed.reshape(*blocks, rows, groups, -1, chunk, width).transpose(0, 2, 1, 5, 3, 4, 6)
    return mixed.reshape(blocks[0] * rows, -1, heads, width)[:batch, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    softcap: float | None, queries: BlockQueries, keys: BlockSlots, values: BlockSlots, mask: BlockMask
) -> BlockQueries:
    """softmax(q k) v of one block; the queries of heads that share a key-value head are stacked along the length."""
    return _forward(softcap, queries, keys, values, mask)[0]


def _forward(
    softcap: float | None, queries: Array, keys: Array, values: Array, mask: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    scores = _scores(softcap, queries, keys, mask)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    mixed = _product(weights.astype(values.dtype), values, 3, 3) / total
    return mixed.astype(values.dtype), (queries, keys, values, mask, mixed, highest, total)


def _backward(softcap: float | None, kept: tuple[Any, ...], mixed_bar: Array) -> tuple[Array | None, ...]:
    """d scores = weights (d mixed v - sum(d mixed mixed)) (arXiv 2205.14135, appendix B.2, equation 4).

    The weights are left unnormalised; the total divides the small gradient of the result instead.
    """
    queries, keys, values, mask, mixed, highest, total = kept
    scaled = mixed_bar / total
    inner = jnp.sum(scaled * mixed, axis=-1, keepdims=True)
    onto = scaled.astype(values.dtype)
    scores = _scores(softcap, queries, keys, mask)
    weights = jnp.exp(scores - highest)
    scores_bar = weights * (_product(onto, values, 3, 2) - inner)
    if softcap is not None:
        scores_bar = scores_bar * (1 - jnp.square(scores / softcap))
    if mask is not None:
        # A query that sees no slot has weights all the same.
        scores_bar = _masked(scores_bar, mask, 0.0)
    scores_bar = scores_bar.astype(queries.dtype)
    values_bar = _product(onto, weights.astype(values.dtype), 2, 2).astype(values.dtype)
    keys_bar = _product(queries, scores_bar, 2, 2).astype(keys.dtype)
    return _product(scores_bar, keys, 3, 3).astype(queries.dtype), keys_bar, values_bar, None


_block.defvjp(_forward, _backward)


def _scores(softcap: float | None, queries: Array, keys: Array, mask: Array | None) -> Float[Array, "b G Rl S"]:
    scores = _product(queries, keys, 3, 2)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return scores if mask is None else _masked(scores, mask, float(jnp.finfo(jnp.float32).min))


def _masked(scores: Array, mask: Bool[Array, "#b 1 1 l S"], hidden: float) -> Array:
    apart = scores.reshape(*scores.shape[:2], -1, *mask.shape[-2:])
    return jnp.where(mask, apart, hidden).reshape(scores.shape)


def _product(left: Array, right: Array, over: int, over_right: int) -> Array:
    """A product of matrices row by row and group by group, summed over these axes of the two, in float32."""
    return jax.lax.dot_general(
        left, right, (((over,), (over_right,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )


def _part(number: int, scores: int) -> int:
    """The size of equal parts of `number` rows or queries, of so many scores each, that make blocks of about BLOCK."""
    parts = min(number, -(-number * scores // BLOCK))
    return -(-number // parts)


def _padded(x: Array, rows: int, length: int | None = None) -> Array:
    spare = rows - x.shape[0], (x.shape[1] if length is None else length) - x.shape[1]
    return jnp.pad(x, ((0, spare[0]), (0, spare[1]), *((0, 0),) * (x.ndim - 2))) if any(spare) else x
