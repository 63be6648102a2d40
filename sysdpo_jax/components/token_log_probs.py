"""Log-probabilities of tokens without the logits of a whole sequence.

Axes: B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sysdpo_jax.models.partitioning import on_own_rows

MAX_CHUNKS = 16
# Of a chunk's logits in float32: smaller ones save nothing that matters.
MIN_CHUNK_BYTES = 4 * 2**20

# (its parameters, hidden states) -> logits in float32, whichever stretch of a sequence they come from.
Head = Callable[[PyTree, Float[Array, "batch length width"]], Float[Array, "batch length vocab"]]


def token_log_probs(
    head: Head,
    params: PyTree,
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
    vocab: int,
) -> Float[Array, "batch length"]:
    """log softmax(head(params, hidden))[target] in float32, over stretches of the length, one by one.

    The backward pass computes each stretch's logits again: no array [B, L, V] exists in either pass where
    `number_of_chunks` is above 1, which is wherever that saves memory.
    params: the head's alone, which are gathered once for all stretches. vocab: the number of logits.
    """
    return on_own_rows(partial(_in_chunks, head, vocab), params, hidden, targets)


def _in_chunks(head: Head, vocab: int, params: PyTree, hidden: Array, targets: Array) -> Array:
    batch, length, width = hidden.shape
    size = -(-length // number_of_chunks(batch * length, width, vocab))
    if size == length:
        return _log_probs(head, params, hidden, targets)

    def of_chunk(chunk: tuple[Array, Array]) -> Array:
        return _log_probs(head, params, *chunk)

    made = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), (_cut(hidden, size), _cut(targets, size)))
    return jnp.moveaxis(made, 0, 1).reshape(batch, -1)[:, :length]


def number_of_chunks(rows: int, width: int, vocab: int) -> int:
    """Into how many stretches a device's rows (batch times length) are cut; 1 where that would cost memory.

    The compiler's temporary bytes of the gradient in hidden states and kernel [D, V] (float32, CPU) are 3 L unchunked
    and K + 3 L / n in n chunks, with L the bytes of the rows' logits and K those of the kernel, a product that waits to
    be added to the sum over chunks. (Measured: K = 32 MiB, L = 32 MiB: 96 and, in 16 chunks, 36 MiB; L = 8 MiB: 24 and
    33.) Over fsdp the kernel and its gradient are whole while the loop runs; tensor divides logits and kernel alike.
    """
    chunks = min(MAX_CHUNKS, 4 * rows * vocab // MIN_CHUNK_BYTES)
    return chunks if width * chunks < 3 * rows * (chunks - 1) else 1


def _log_probs(head: Head, params: PyTree, hidden: Array, targets: Array) -> Array:
    logits = head(params, hidden)
    # A comparison: a gather's gradient scatters into another array of logits, and a mesh may cut the vocabulary.
    picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _cut(x: Array, size: int) -> Array:
    """[B, L, ...] as [chunks, B, size, ...], padded with zeros; the batch stays whole, for a mesh cuts it."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(padded.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
