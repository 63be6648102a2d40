"""Draws of the next token from logits, each row with a key of its own.

Axes: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# So many probabilities are summed at first. A token's share of its block is more than what float32 uniforms leave out.
BLOCK = 128


def sample_token(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " batch"]:
    """One token per row by the rules of `generate`; only the branch taken runs: top_p 1 pays for no sort."""

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def full() -> Array:
        return categorical(logits / temperature, keys)

    def nucleus() -> Array:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        rank = categorical(jnp.where(before < top_p, ranked, -jnp.inf), keys)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    # Not top_p alone: at top_p 1 the rounded cumulative sum would cut the tail.
    branch = jnp.where(temperature == 0, 0, jnp.where(top_p >= 1, 1, 2))
    return jax.lax.switch(branch, (greedy, full, nucleus))


def categorical(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """One index per row with probability softmax(logits): a block by its sum, then an index within it.

    Two uniforms a row in place of one for each of the vocabulary's tokens, whose making costs more than the softmax.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    spare = -weights.shape[1] % BLOCK
    blocks = jnp.pad(weights, ((0, 0), (0, spare))).reshape(len(weights), -1, BLOCK)
    within, among = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    block = _inverted(jnp.sum(blocks, axis=-1), among)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _inverted(inside, within)


def _inverted(weights: Float[Array, "batch choices"], uniforms: Float[Array, " batch"]) -> Int[Array, " batch"]:
    """The first choice up to which the weights reach the uniform's share of their sum, never one of weight 0."""
    reached = jnp.cumsum(weights, axis=-1)
    beyond = (reached > uniforms[:, None] * reached[:, -1:]) & (weights > 0)
    # Sums that are made in parallel may round a step downwards, so that nothing is left at the very end.
    found = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))
    return found.astype(jnp.int32)
