"""Sampling of continuations from a decoder with a key-value cache, compiled once per shape.

Axes: B batch, P padded prompt length, N new tokens, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from sysdpo_jax.models.decoder import Decoder, KVCache, init_cache


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: int [batch, max_new_tokens], padded after each row's end.
        lengths: int [batch], which count a stop token that was produced.
    """

    tokens: Array
    lengths: Array


class _State(NamedTuple):
    made: Array  # tokens made so far, the same for all rows
    token: Array  # [B] the newest token
    tokens: Array  # [B, N]
    lengths: Array  # [B]
    stopped: Array  # bool [B]
    cache: KVCache


def generate(
    decoder: Decoder,
    params: PyTree,
    prompts: Int[Array | np.ndarray, "batch prompt"],
    prompt_lengths: Int[Array | np.ndarray, " batch"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Generated:
    """Continue right-padded prompts until each row has produced one of stop_tokens or max_new_tokens tokens.

    Other values of temperature, top_p, the key or the parameters do not compile anew; the loop ends when all rows have
    stopped.

    Args:
        decoder: The model.
        params: Its parameters.
        prompts: Token ids.
        prompt_lengths: In tokens.
        key: Of the draws.
        max_new_tokens: At most so many a row.
        stop_tokens: Ids that end a row.
        pad_token: What fills a row after its end.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Sample among the smallest set of likeliest tokens whose probability, after the temperature, reaches top_p
            (nucleus sampling, arXiv 1904.09751, section 3.1).

    Returns:
        The new tokens and their numbers.

    Raises:
        ValueError: If prompts and new tokens outnumber max_position_embeddings, a setting is out of range, or
            prompt_lengths is a NumPy array with values outside [1, P]; lengths on the device are not looked at.
    """
    check_prompts("generate", decoder, prompts, prompt_lengths, max_new_tokens)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1].")
    static = decoder, max_new_tokens, stop_tokens, pad_token
    settings = jnp.float32(temperature), jnp.float32(top_p)
    return _generate(*static, params, jnp.asarray(prompts), jnp.asarray(prompt_lengths), key, settings)


def check_prompts(
    caller: str,
    decoder: Decoder,
    prompts: Int[Array | np.ndarray, "batch prompt"],
    prompt_lengths: Int[Array | np.ndarray, " batch"],
    max_new_tokens: int,
) -> None:
    """Raises the ValueErrors of `generate` on prompts and lengths, in the name of the caller."""
    room, total = decoder.config.max_position_embeddings, prompts.shape[1] + max_new_tokens
    if max_new_tokens < 1 or total > room:
        raise ValueError(
            f"{caller}: max_new_tokens {max_new_tokens} must be at least 1 and, after prompts of "
            f"{prompts.shape[1]} tokens, fit in max_position_embeddings {room}."
        )
    # A device array may be traced or spread over hosts, so only host arrays can be checked.
    if isinstance(prompt_lengths, np.ndarray) and np.any((prompt_lengths < 1) | (prompt_lengths > prompts.shape[1])):
        raise ValueError(
            f"{caller}: prompt_lengths must lie in [1, {prompts.shape[1]}], got {prompt_lengths.tolist()}; "
            "an empty prompt needs at least a start token."
        )


def sample_token(
    logits: Float[Array, "batch vocab"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " batch"]:
    """One token per row by the rules of `generate`; only the branch taken runs: top_p 1 pays for no sort."""

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1)

    def full() -> Array:
        return jax.random.categorical(key, logits / temperature)

    def nucleus() -> Array:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        rank = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]

    # Not top_p alone: at top_p 1 the rounded cumulative sum would cut the tail.
    branch = jnp.where(temperature == 0, 0, jnp.where(top_p >= 1, 1, 2))
    return jax.lax.switch(branch, (greedy, full, nucleus))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    decoder: Decoder,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    params: PyTree,
    prompts: Int[Array, "batch prompt"],
    prompt_lengths: Int[Array, " batch"],
    key: PRNGKeyArray,
    settings: tuple[Float[Array, ""], Float[Array, ""]],
) -> Generated:
    batch, prompt = prompts.shape
    stops = jnp.array(stop_tokens, jnp.int32)

    def run(method: str, *inputs: Any) -> Any:
        return decoder.apply({"params": params}, *inputs, method=method)

    def choose(hidden: Array, made: Array) -> Array:
        logits = run("head", hidden)[:, 0]
        return sample_token(logits, jax.random.fold_in(key, made), *settings).astype(jnp.int32)

    def record(state: _State, token: Array, cache: KVCache) -> _State:
        token = jnp.where(state.stopped, pad_token, token)
        return _State(
            made=state.made + 1,
            token=token,
            tokens=state.tokens.at[:, state.made].set(token),
            lengths=state.lengths + ~state.stopped,
            stopped=state.stopped | jnp.isin(token, stops),
            cache=cache,
        )

    def step(state: _State) -> _State:
        newest = prompt + state.made - 1
        positions = (prompt_lengths + state.made - 1)[:, None]
        hidden, cache = run("extend", state.token[:, None], state.cache, newest, positions)
        return record(state, choose(hidden, state.made), cache)

    mask = jnp.arange(prompt) < prompt_lengths[:, None]
    # The last token made is never fed back, so it needs no slot.
    empty = init_cache(decoder.config, batch, prompt + max_new_tokens - 1)
    hidden, cache = run("extend", prompts, empty, 0, None, mask)
    last = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)
    start = _State(
        made=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, max_new_tokens), pad_token, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        cache=empty,
    )
    first = record(start, choose(last, start.made), cache)
    end = jax.lax.while_loop(lambda s: (s.made < max_new_tokens) & ~jnp.all(s.stopped), step, first)
    return Generated(end.tokens, end.lengths)
