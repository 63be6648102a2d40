"""Attention of new tokens on a cache of keys and values, which is laid out so that a step reads it once, as it lies.

Slots are the last axis but one: the batch and the key-value heads before it are then one batch of products, each of
which reads a contiguous block; with any other order a backend copies the cache before its products.

Axes: B batch, L new tokens, S cache slots, H heads, G key-value heads, K head width, C rows of a shared cache.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.attention_request import Queries
from sysdpo_jax.models.partitioning import constrain

Cached = Float[Array, "rows groups slots width"]
# Keys or values of new tokens.
New = Float[Array, "rows length groups width"]
# Keys and values [C, G, S, K], and which slots a query sees, [B, L, S].
Part = tuple[Array, Array, Array]


def laid_out(x: New) -> Float[Array, "rows groups length width"]:
    """Keys or values [B, L, G, K] of tokens in the order of the cache, [B, G, L, K]."""
    return constrain(x.transpose(0, 2, 1, 3), "batch", "heads", None, None)


def put(cached: Cached, new: New, slot: int | Int[Array, ""]) -> Cached:
    """The cache with new keys or values at `slot` and those behind it; in place where the cache is a loop's own."""
    return jax.lax.dynamic_update_slice_in_dim(cached, laid_out(new).astype(cached.dtype), slot, axis=2)


def attend_cached(
    queries: Queries,
    parts: Sequence[Part],
    scale: float | None = None,
    softcap: float | None = None,
) -> Queries:
    """softmax(scale q k) v in float32 over the slots of all parts, each of them keys, values and what a query sees.

    A part of fewer rows than queries is shared: each of its C rows by B / C rows that follow each other. A query that
    sees no slot gets a finite average. scale and softcap: as in `attention.attend`.
    """
    batch, length, heads, width = queries.shape
    groups = parts[0][0].shape[1]
    # The heads that share a key-value head, the tokens, and the rows that share a cache are rows of one product.
    split = queries.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)

    def gather(x: Array, rows: int) -> Array:
        x = x.reshape(rows, batch // rows, groups, -1, x.shape[-1])
        return x.transpose(0, 2, 1, 3, 4).reshape(rows, groups, -1, x.shape[-1])

    def apart(x: Array, rows: int) -> Array:
        x = x.reshape(rows, groups, batch // rows, -1, x.shape[-1]).transpose(0, 2, 1, 3, 4)
        return x.reshape(batch, groups, heads // groups, length, x.shape[-1])

    scores = []
    for keys, _, visible in parts:
        rows = keys.shape[0]
        found = jnp.einsum("rgqk,rgsk->rgqs", gather(split, rows), keys, preferred_element_type=jnp.float32)
        found = apart(found, rows) * (1 / math.sqrt(width) if scale is None else scale)
        if softcap is not None:
            found = softcap * jnp.tanh(found / softcap)
        scores.append(jnp.where(visible[:, None, None], found, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(queries.dtype)
    mixed, start = jnp.zeros_like(split), 0
    for keys, values, _ in parts:
        rows, slots = keys.shape[0], keys.shape[2]
        part = gather(weights[..., start : start + slots], rows)
        mixed = mixed + apart(jnp.einsum("rgqs,rgsk->rgqk", part, values), rows)
        start += slots
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
