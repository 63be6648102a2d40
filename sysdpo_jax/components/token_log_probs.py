"""Log-probabilities of tokens without the logits of a whole sequence.

Axes: B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sysdpo_jax.models.attention import backend
from sysdpo_jax.models.partitioning import on_own_rows

MAX_CHUNKS = 16
# Of a chunk's logits in float32; on a GPU more, because each chunk reads the head and adds to its gradient in memory,
# which takes as long as the products of some 400 rows: 1 GiB are 2,000 rows of 128,000 logits.
MIN_CHUNK_BYTES, MIN_CHUNK_BYTES_OF_GPU = 64 * 2**20, 2**30

# (its parameters, hidden states) -> logits in float32, whichever stretch of a sequence they come from.
Head = Callable[[PyTree, Float[Array, "*leading width"]], Float[Array, "*leading vocab"]]


def token_log_probs(
    head: Head,
    params: PyTree,
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
    vocab: int,
) -> Float[Array, "batch length"]:
    """log softmax(head(params, hidden))[target] in float32, over stretches of the length, one by one.

    The backward pass computes each stretch's logits again: no array [B, L, V] exists in either pass where
    `number_of_chunks` is above 1, which is wherever that saves memory. It reads them once, because the forward pass
    keeps their normaliser, and adds up the head's gradient over stretches in float32.
    params: the head's alone, which are gathered once for all stretches. vocab: the number of logits.
    """
    return on_own_rows(partial(_in_chunks, head, vocab), params, hidden, targets)


def _in_chunks(head: Head, vocab: int, params: PyTree, hidden: Array, targets: Array) -> Array:
    batch, length, width = hidden.shape
    size = -(-length // number_of_chunks(batch * length, width, vocab))
    if size == length:
        return _log_probs(head(params, hidden), targets)
    made = _of_chunks(head, params, _cut(hidden, size), _cut(targets, size))
    return jnp.moveaxis(made.reshape(-1, batch, size), 0, 1).reshape(batch, -1)[:, :length]


def number_of_chunks(rows: int, width: int, vocab: int) -> int:
    """Into how many stretches a device's rows (batch times length) are cut; 1 where that would cost memory.

    The compiler's temporary bytes of the gradient in hidden states and kernel [D, V] (float32, CPU) are 2 L unchunked
    and K + 2 L / n in n chunks, with L the bytes of the rows' logits and K those of the kernel, a product that waits to
    be added to the sum over chunks. Over fsdp the kernel and its gradient are whole while the loop runs; tensor divides
    logits and kernel alike.
    """
    smallest = MIN_CHUNK_BYTES_OF_GPU if backend() == "gpu" else MIN_CHUNK_BYTES
    chunks = min(MAX_CHUNKS, 4 * rows * vocab // smallest)
    return chunks if width * chunks < 2 * rows * (chunks - 1) else 1


def _is_target(logits: Array, targets: Array) -> Array:
    # A comparison and no gather: a mesh may cut the vocabulary.
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _picked(logits: Array, targets: Array) -> tuple[Array, Array]:
    """log softmax(logits)[target] and the normaliser log sum exp(logits).

    Both sums are over the distances from the largest logit, by which the compiler joins them: logits are read twice.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # As in logsumexp: where the largest is infinite a distance from it would be no number.
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    below = logits - largest
    normaliser = jnp.log(jnp.sum(jnp.exp(below), axis=-1))
    target = jnp.sum(jnp.where(_is_target(logits, targets), below, 0), axis=-1)
    return target - normaliser, normaliser + largest[..., 0]


def _gradient(logits: Array, normaliser: Array, targets: Array, cotangent: Array) -> Array:
    """Of log softmax(logits)[target] in the logits: one pass over them."""
    own = _is_target(logits, targets).astype(logits.dtype)
    return cotangent[..., None] * (own - jnp.exp(logits - normaliser[..., None]))


@jax.custom_vjp
def _log_probs(logits: Array, targets: Array) -> Array:
    return _log_probs_forward(logits, targets)[0]


def _log_probs_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    picked, normaliser = _picked(logits, targets)
    return picked, (logits, normaliser, targets)


def _log_probs_backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None]:
    return _gradient(*kept, cotangent), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_chunks(head: Head, params: PyTree, hidden: Array, targets: Array) -> Array:
    """[chunks, B size] of hidden states [chunks, B size, D]."""
    return _of_chunks_forward(head, params, hidden, targets)[0]


def _of_chunks_forward(head: Head, params: PyTree, hidden: Array, targets: Array) -> tuple[Array, Any]:
    def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return _picked(head(params, chunk[0]), chunk[1])

    made, normalisers = jax.lax.map(of_chunk, (hidden, targets))
    return made, (params, hidden, targets, normalisers)


def _of_chunks_backward(head: Head, kept: Any, cotangents: Array) -> tuple[PyTree, Array, None]:
    params, *chunks = kept

    def of_chunk(total: PyTree, chunk: tuple[Array, ...]) -> tuple[PyTree, Array]:
        hidden, targets, normaliser, cotangent = chunk
        logits, pull = jax.vjp(head, params, hidden)
        of_params, of_hidden = pull(_gradient(logits, normaliser, targets, cotangent))
        return jax.tree.map(lambda sums, part: sums + part.astype(sums.dtype), total, of_params), of_hidden

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)
    total, of_hidden = jax.lax.scan(of_chunk, zeros, (*chunks, cotangents))
    return jax.tree.map(lambda sums, x: sums.astype(x.dtype), total, params), of_hidden, None


_of_chunks.defvjp(_of_chunks_forward, _of_chunks_backward)


def _cut(x: Array, size: int) -> Array:
    """[B, L, ...] as [chunks, B size, ...], padded with zeros; the batch stays whole, for a mesh cuts it.

    The rows of a chunk are one axis, over which the gradient's products sum without a transposed copy.
    """
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    chunks = jnp.moveaxis(padded.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    return chunks.reshape(-1, x.shape[0] * size, *x.shape[2:])
