"""Sampling of continuations from a decoder with a key-value cache and beam search over them, compiled once per shape.

Axes: B batch, R beams, P padded prompt length, N new tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search
from sysdpo_jax.decoding.draws import sample_token
from sysdpo_jax.models.cached_attention import laid_out
from sysdpo_jax.models.decoder import KEPT, Decoder, KVCache, init_cache, unstacked

Prompts = Int[Array | np.ndarray, "batch prompt"]
Lengths = Int[Array | np.ndarray, " batch"]
Settings = tuple[Float[Array, ""], Float[Array, ""]]

# A loop of token steps makes at least so many tokens before the next, with more slots, takes over; of so many at most.
STAGE, MAX_STAGES = 256, 4


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: int [batch, max_new_tokens], padded after each row's end.
        lengths: int [batch], which count a stop token that was produced.
    """

    tokens: Array
    lengths: Array


@dataclass(frozen=True)
class _Decoding:
    """What the compiled loops depend on beside shapes, and the model as they call it."""

    decoder: Decoder
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    pad_token: int

    def check(self, caller: str, prompts: Prompts, prompt_lengths: Lengths) -> None:
        """Raises the ValueErrors of `generate` on prompts and lengths, in the name of the caller."""
        room, longest = self.decoder.config.max_position_embeddings, prompts.shape[1]
        if self.max_new_tokens < 1 or longest + self.max_new_tokens > room:
            raise ValueError(
                f"{caller}: max_new_tokens {self.max_new_tokens} must be at least 1 and, after prompts of "
                f"{longest} tokens, fit in max_position_embeddings {room}."
            )
        # A device array may be traced or spread over hosts, so only host arrays can be checked.
        if isinstance(prompt_lengths, np.ndarray) and np.any((prompt_lengths < 1) | (prompt_lengths > longest)):
            raise ValueError(
                f"{caller}: prompt_lengths must lie in [1, {longest}], got {prompt_lengths.tolist()}; "
                "an empty prompt needs at least a start token."
            )

    def prefill(self, params: PyTree, prompts: Prompts, lengths: Lengths, spare: int) -> tuple[Array, KVCache]:
        """Logits [B, V] of the first new token, and the cache of the prompts with so many spare slots behind.

        The prompts run as in training: padding on the right is behind what any real token sees, and hidden later.
        """
        batch, prompt = prompts.shape
        hidden, kept = self.decoder.apply({"params": params}, prompts, method="hidden_states", mutable=[KEPT])
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        stacks = kept[KEPT]["layers"]["self_attn"]

        def layers(stack: Array) -> tuple[Array, ...]:
            room = ((0, 0), (0, 0), (0, spare), (0, 0))
            return tuple(jnp.pad(laid_out(stack[number]), room) for number in range(len(stack)))

        slots = jnp.broadcast_to(jnp.arange(prompt + spare), (batch, prompt + spare))
        cache = KVCache(layers(stacks["keys"]), layers(stacks["values"]), slots < lengths[:, None], slots)
        return self._run(params, "head", last)[:, 0], cache

    def extend(
        self,
        params: PyTree,
        tokens: Array,
        cache: KVCache,
        slot: Array,
        at: Lengths,
        mask: Array | None = None,
        shared: KVCache | None = None,
    ) -> tuple[Array, KVCache]:
        """Logits [rows, V] after one more token [rows] of each row, put at a slot of the cache and a position `at`."""
        hidden, cache = self._run(params, "extend", tokens[:, None], cache, slot, at[:, None], mask, shared)
        return self._run(params, "head", hidden)[:, 0], cache

    def _run(self, params: PyTree, method: str, *inputs: Any) -> Any:
        return self.decoder.apply({"params": params}, *inputs, method=method)


class _State(NamedTuple):
    """B places, each of which continues one of the n prompts, or none."""

    at: Array  # how many slots have been filled since the start; the cache is a ring of them
    begun: Array  # how many of the prompts are being continued or have been
    prompt: Array  # [B] which prompt, n at an idle place
    made: Array  # [B] tokens of it so far
    token: Array  # [B] the newest token
    tokens: Array  # [n, N]
    lengths: Array  # [n]
    cache: KVCache


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
    decoding = _Decoding(decoder, max_new_tokens, stop_tokens, pad_token)
    decoding.check("generate", prompts, prompt_lengths)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1].")
    if places is not None and places < 1:
        raise ValueError(f"generate: places {places} must be at least 1, or None.")
    places = len(prompts) if places is None else min(places, len(prompts))
    settings = jnp.float32(temperature), jnp.float32(top_p)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(prompts)))
    return _generate(decoding, places, params, jnp.asarray(prompts), jnp.asarray(prompt_lengths), keys, settings)


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
    decoding = _Decoding(decoder, max_new_tokens, stop_tokens, pad_token)
    decoding.check("beam_generate", prompts, prompt_lengths)
    beams, inputs = (num_beams, search.groups(num_beams)), (jnp.asarray(prompts), jnp.asarray(prompt_lengths))
    return _beam_generate(decoding, beams, search.penalties(), params, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    decoding: _Decoding,
    places: int,
    params: PyTree,
    prompts: Prompts,
    lengths: Lengths,
    keys: Key[Array, " batch"],
    settings: Settings,
) -> Generated:
    (number, width), room = prompts.shape, decoding.max_new_tokens
    # So many places must be idle before prompts that wait are put there, as many at a time as make a good product.
    together = places if places == number else max(1, places // 4)
    # The last token made is never fed back, so it needs no slot.
    slots = width + room - 1
    # Attention reads every slot that there is. While no slot is used twice, they can be few at first.
    stages = _stages(width, slots) if together == number else (slots,)
    stops = jnp.array(decoding.stop_tokens, jnp.int32)
    apart = unstacked(params)

    def drawn(logits: Array, prompt: Array, made: Array) -> Array:
        own = jax.vmap(jax.random.fold_in)(keys[jnp.minimum(prompt, number - 1)], made)
        return sample_token(logits, own, *settings)

    def record(state: _State, going: Array, token: Array) -> _State:
        """The state after the next token of the places that are `going`."""
        prompt, made = jnp.where(going, state.prompt, number), state.made + going
        ends = going & (jnp.isin(token, stops) | (made == room))
        return state._replace(
            prompt=jnp.where(ends, number, state.prompt),
            made=made,
            token=jnp.where(going, token, state.token),
            tokens=state.tokens.at[prompt, state.made].set(token, mode="drop"),
            lengths=state.lengths.at[prompt].set(made, mode="drop"),
        )

    def step(state: _State) -> _State:
        going, made = state.prompt < number, state.made
        positions = lengths[jnp.minimum(state.prompt, number - 1)] + made - 1
        slot = state.at % state.cache.valid.shape[1]
        logits, cache = decoding.extend(apart, state.token, state.cache, slot, positions, going[:, None])
        token = drawn(logits, state.prompt, made)
        return record(state._replace(at=state.at + 1, cache=cache), going, token)

    def fill(state: _State) -> _State:
        """Prompts that wait at idle places, with their first tokens. Their slots end where the next token is put."""
        [idle] = jnp.nonzero(state.prompt == number, size=together, fill_value=places)
        waiting = jnp.minimum(state.begun + jnp.arange(together), number)
        picked = jnp.minimum(waiting, number - 1)
        logits, own = decoding.prefill(params, prompts[picked], lengths[picked], stages[0] - width)

        def put(old: Array, new: Array) -> Array:
            if together == number:
                return new
            turned = jnp.roll(new, state.at - width, axis=2 if new.ndim == 4 else 1)
            return old.at[idle].set(turned, mode="drop")

        fresh = jnp.full(places, number, jnp.int32).at[idle].set(waiting, mode="drop")
        begun = state._replace(
            begun=state.begun + together,
            prompt=jnp.minimum(state.prompt, fresh),
            made=jnp.where(fresh < number, 0, state.made),
            cache=jax.tree.map(put, state.cache, own),
        )
        first = drawn(logits, picked, jnp.zeros(together, jnp.int32))
        return record(begun, fresh < number, jnp.zeros(places, jnp.int32).at[idle].set(first, mode="drop"))

    def may_go_on(state: _State) -> Array:
        idle = state.prompt == number
        return ~jnp.all(idle) & ~((state.begun < number) & (jnp.sum(idle) >= together))

    def until_filled(state: _State, slots: int) -> _State:
        grown = state._replace(cache=_grown(state.cache, slots))
        return jax.lax.while_loop(lambda s: may_go_on(s) & (s.at < slots), step, grown)

    def round_of_prompts(state: _State) -> _State:
        return jax.lax.while_loop(may_go_on, step, fill(state))

    state = _State(
        at=jnp.int32(width),
        begun=jnp.int32(0),
        prompt=jnp.full(places, number, jnp.int32),
        made=jnp.zeros(places, jnp.int32),
        token=jnp.zeros(places, jnp.int32),
        tokens=jnp.full((number, room), decoding.pad_token, jnp.int32),
        lengths=jnp.zeros(number, jnp.int32),
        cache=init_cache(decoding.decoder.config, places, stages[0]),
    )
    if together == number:
        end = functools.reduce(until_filled, stages, fill(state))
    else:
        end = jax.lax.while_loop(lambda s: (s.begun < number) | jnp.any(s.prompt < number), round_of_prompts, state)
    return Generated(end.tokens, end.lengths)


def _stages(width: int, slots: int) -> tuple[int, ...]:
    """How many slots there are in each of the loops that follow each other: each of them is compiled."""
    number = min(MAX_STAGES, max(1, (slots - width + 1) // STAGE))
    return tuple(width + (slots - width) * (stage + 1) // number for stage in range(number))


def _grown(cache: KVCache, slots: int) -> KVCache:
    def grown(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, slots - x.shape[axis] if here == axis else 0) for here in range(x.ndim)])

    keys, values = jax.tree.map(lambda x: grown(x, 2), (cache.keys, cache.values))
    return KVCache(keys, values, grown(cache.valid, 1), grown(cache.positions, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _beam_generate(
    decoding: _Decoding,
    beams: tuple[int, int],
    penalties: Penalties,
    params: PyTree,
    prompts: Prompts,
    lengths: Lengths,
) -> Beams:
    batch, (num_beams, num_groups) = len(prompts), beams

    def step(
        tokens: Array, parents: Array | None, cache: KVCache, made: Array
    ) -> tuple[Float[Array, "batch beams vocab"], KVCache]:
        if parents is not None:
            cache = _reorder(cache, parents)
        positions = jnp.repeat(lengths + made - 1, num_beams)
        logits, cache = decoding.extend(layers_apart, tokens.ravel(), cache, made - 1, positions, None, shared)
        return logits.reshape(batch, num_beams, -1), cache

    logits, shared = decoding.prefill(params, prompts, lengths, 0)
    layers_apart = unstacked(params)
    return beam_search(
        step,
        logits,
        # The last token made is never fed back, so it needs no slot; but the loop that would not run needs one.
        init_cache(decoding.decoder.config, batch * num_beams, max(1, decoding.max_new_tokens - 1)),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=decoding.max_new_tokens,
        stop_tokens=decoding.stop_tokens,
        pad_token=decoding.pad_token,
    )


def _reorder(cache: KVCache, parents: Int[Array, "batch beams"]) -> KVCache:
    """The cache of the beams that `parents` [B, R] name, counted within their row.

    Which slots hold a token at which position is the same for all beams of a row.
    """
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).ravel()
    keys, values = jax.tree.map(lambda x: x[rows], (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)
