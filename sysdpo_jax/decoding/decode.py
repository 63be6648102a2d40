"""Sampling of continuations from a decoder with a key-value cache and beam search over them, compiled once per shape.

Axes: B batch, R beams, P padded prompt length, N new tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search
from sysdpo_jax.decoding.cached_model import CachedModel, Lengths, Prompts
from sysdpo_jax.decoding.sampling import Generated, sampled
from sysdpo_jax.keys import row_keys
from sysdpo_jax.models.decoder import Decoder, KVCache, init_cache, unstacked

__all__ = ["Generated", "beam_generate", "generate"]


def generate(
    decoder: Decoder,
    params: PyTree,
    prompts: Prompts,
    prompt_lengths: Lengths,
    key: Key[Array, "*batch"],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    places: int | None = None,
) -> Generated:
    """Continue right-padded prompts until each row has produced one of stop_tokens or max_new_tokens tokens.

    What a row draws depends on its own key, or on the key and the row's number, and not on the rows beside it. Other
    values of temperature, top_p, the key or the parameters do not compile anew; the loop ends when all rows have
    stopped.

    Args:
        decoder: The model.
        params: Its parameters.
        prompts: Token ids.
        prompt_lengths: In tokens.
        key: Of the draws, one for all rows or one a row.
        max_new_tokens: At most so many a row.
        stop_tokens: Ids that end a row.
        pad_token: What fills a row after its end.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Sample among the smallest set of likeliest tokens whose probability, after the temperature, reaches top_p
            (nucleus sampling, arXiv 1904.09751, section 3.1).
        places: How many rows are continued at a time, by default all. The rows that wait take, in their order, the
            places of rows that have ended, a quarter of the places at a time. This pays where many rows end long before
            max_new_tokens, and bounds the memory of the cache.

    Returns:
        The new tokens and their numbers.

    Raises:
        ValueError: If prompts and new tokens outnumber max_position_embeddings, a setting is out of range, or
            prompt_lengths is a NumPy array with values outside [1, P]; lengths on the device are not looked at.
    """
    model = CachedModel(decoder, max_new_tokens, stop_tokens, pad_token)
    model.check("generate", prompts, prompt_lengths)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1].")
    if places is not None and places < 1:
        raise ValueError(f"generate: places {places} must be at least 1, or None.")
    places = len(prompts) if places is None else min(places, len(prompts))
    settings = jnp.float32(temperature), jnp.float32(top_p)
    keys = row_keys(key, len(prompts))
    return sampled(model, places, params, jnp.asarray(prompts), jnp.asarray(prompt_lengths), keys, settings)


def beam_generate(
    decoder: Decoder,
    params: PyTree,
    prompts: Prompts,
    prompt_lengths: Lengths,
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
    model = CachedModel(decoder, max_new_tokens, stop_tokens, pad_token)
    model.check("beam_generate", prompts, prompt_lengths)
    beams, inputs = (num_beams, search.groups(num_beams)), (jnp.asarray(prompts), jnp.asarray(prompt_lengths))
    return _beam_generate(model, beams, search.penalties(), params, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _beam_generate(
    model: CachedModel,
    beams: tuple[int, int],
    penalties: Penalties,
    params: PyTree,
    prompts: Prompts,
    lengths: Lengths,
) -> Beams:
    (batch, width), (num_beams, num_groups) = prompts.shape, beams
    # The last token made is never fed back, so it needs no slot; but the loop that would not run needs one.
    slots = model.slots(max(1, model.max_new_tokens - 1), beside=width)

    def step(
        tokens: Array, parents: Array | None, cache: KVCache, made: Array
    ) -> tuple[Float[Array, "batch beams vocab"], KVCache]:
        if parents is not None:
            cache = _reorder(cache, parents)
        positions = jnp.repeat(lengths + made - 1, num_beams)
        logits, cache = model.extend(layers_apart, tokens.ravel(), cache, made - 1, positions, None, shared)
        return logits.reshape(batch, num_beams, -1), cache

    logits, shared = model.prefill(params, prompts, lengths, 0)
    layers_apart = unstacked(model.decoder.config, params)
    return beam_search(
        step,
        logits,
        init_cache(model.decoder.config, batch * num_beams, slots),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=model.max_new_tokens,
        stop_tokens=model.stop_tokens,
        pad_token=model.pad_token,
    )


def _reorder(cache: KVCache, parents: Int[Array, "batch beams"]) -> KVCache:
    """The cache of the beams that `parents` [B, R] name, counted within their row.

    Which slots hold a token at which position is the same for all beams of a row.
    """
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).ravel()
    keys, values = jax.tree.map(lambda x: x[rows], (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)
