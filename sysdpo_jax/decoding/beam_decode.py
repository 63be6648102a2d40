"""Beam search over continuations of a decoder with a key-value cache, compiled once per shape.

Axes: B batch, R beams, P padded prompt length, N new tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search
from sysdpo_jax.decoding.decode import check_prompts
from sysdpo_jax.models.decoder import Decoder, KVCache, init_cache


def beam_generate(
    decoder: Decoder,
    params: PyTree,
    prompts: Int[Array | np.ndarray, "batch prompt"],
    prompt_lengths: Int[Array | np.ndarray, " batch"],
    *,
    num_beams: int,
    search: BeamSearch,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> Beams:
    """Find the num_beams best distinct continuations of each right-padded prompt.

    Penalties, early stopping and parameters of other values do not compile anew; the loop ends when no row can improve.

    Args:
        decoder: The model.
        params: Its parameters.
        prompts: Token ids.
        prompt_lengths: In tokens.
        num_beams: How many continuations.
        search: Settings of the search.
        max_new_tokens: A sequence ends there, if not at a stop token.
        stop_tokens: Ids that end a sequence.
        pad_token: What fills a sequence after its end.

    Returns:
        The sequences, the best first.

    Raises:
        ValueError: For beams that do not divide into the groups, and for prompts and lengths as `generate`.
    """
    check_prompts("beam_generate", decoder, prompts, prompt_lengths, max_new_tokens)
    static = decoder, num_beams, search.groups(num_beams), max_new_tokens, stop_tokens, pad_token
    return _generate(*static, params, jnp.asarray(prompts), jnp.asarray(prompt_lengths), search.penalties())


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _generate(
    decoder: Decoder,
    num_beams: int,
    num_groups: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    params: PyTree,
    prompts: Int[Array, "batch prompt"],
    prompt_lengths: Int[Array, " batch"],
    penalties: Penalties,
) -> Beams:
    batch, prompt = prompts.shape

    def run(method: str, *inputs: Any) -> Any:
        return decoder.apply({"params": params}, *inputs, method=method)

    def step(
        tokens: Array, parents: Array | None, cache: KVCache, made: Array
    ) -> tuple[Float[Array, "batch beams vocab"], KVCache]:
        if parents is not None:
            cache = _reorder(cache, parents, prompt)
        newest = prompt + made - 1
        positions = jnp.repeat(prompt_lengths + made - 1, num_beams)[:, None]
        hidden, cache = run("extend", tokens.reshape(-1, 1), cache, newest, positions)
        return run("head", hidden).reshape(batch, num_beams, -1), cache

    mask = jnp.arange(prompt) < prompt_lengths[:, None]
    hidden, cache = run("extend", prompts, init_cache(decoder.config, batch, prompt), 0, None, mask)
    last = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)
    return beam_search(
        step,
        run("head", last)[:, 0],
        # The last token made is never fed back, so it needs no slot.
        _spread(cache, num_beams, max_new_tokens - 1),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
    )


def _spread(cache: KVCache, beams: int, slots: int) -> KVCache:
    """The cache with each row repeated for its beams and so many empty slots behind."""

    def spread(x: Array, rows: int) -> Array:
        pads = [(0, slots if axis == rows + 1 else 0) for axis in range(x.ndim)]
        return jnp.pad(jnp.repeat(x, beams, axis=rows), pads)

    keys, values = spread(cache.keys, 1), spread(cache.values, 1)
    return KVCache(keys, values, spread(cache.valid, 0), spread(cache.positions, 0))


def _reorder(cache: KVCache, parents: Int[Array, "batch beams"], prompt: int) -> KVCache:
    """The cache of the beams that `parents` [B, R] name, counted within their row.

    The slots of the prompt, and which slots hold a token at which position, are the same for all beams of a row.
    """
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).ravel()

    def made(x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, x[:, rows, prompt:], prompt, axis=2)

    return cache._replace(keys=made(cache.keys), values=made(cache.values))
