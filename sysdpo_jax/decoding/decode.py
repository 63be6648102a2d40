"""Sampling of continuations from a decoder with a key-value cache and beam search over them, compiled once per shape.

Axes: B batch, R beams, P padded prompt length, N new tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search
from sysdpo_jax.models.cached_attention import laid_out
from sysdpo_jax.models.decoder import KEPT, Decoder, KVCache, init_cache, unstacked

Prompts = Int[Array | np.ndarray, "batch prompt"]
Lengths = Int[Array | np.ndarray, " batch"]
Settings = tuple[Float[Array, ""], Float[Array, ""]]


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
        shared: KVCache | None = None,
    ) -> tuple[Array, KVCache]:
        """Logits [rows, V] after one more token [rows] of each row, put at a slot of the cache and a position `at`."""
        hidden, cache = self._run(params, "extend", tokens[:, None], cache, slot, at[:, None], None, shared)
        return self._run(params, "head", hidden)[:, 0], cache

    def _run(self, params: PyTree, method: str, *inputs: Any) -> Any:
        return self.decoder.apply({"params": params}, *inputs, method=method)


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
    prompts: Prompts,
    prompt_lengths: Lengths,
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
    decoding = _Decoding(decoder, max_new_tokens, stop_tokens, pad_token)
    decoding.check("generate", prompts, prompt_lengths)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1].")
    settings = jnp.float32(temperature), jnp.float32(top_p)
    return _generate(decoding, params, jnp.asarray(prompts), jnp.asarray(prompt_lengths), key, settings)


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


def sample_token(
    logits: Float[Array, "batch vocab"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
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


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    decoding: _Decoding, params: PyTree, prompts: Prompts, lengths: Lengths, key: PRNGKeyArray, settings: Settings
) -> Generated:
    (batch, prompt), room = prompts.shape, decoding.max_new_tokens
    stops = jnp.array(decoding.stop_tokens, jnp.int32)

    def record(state: _State, logits: Array, cache: KVCache) -> _State:
        token = sample_token(logits, jax.random.fold_in(key, state.made), *settings).astype(jnp.int32)
        token = jnp.where(state.stopped, decoding.pad_token, token)
        return _State(
            made=state.made + 1,
            token=token,
            tokens=state.tokens.at[:, state.made].set(token),
            lengths=state.lengths + ~state.stopped,
            stopped=state.stopped | jnp.isin(token, stops),
            cache=cache,
        )

    def step(state: _State) -> _State:
        slot, positions = prompt + state.made - 1, lengths + state.made - 1
        return record(state, *decoding.extend(params, state.token, state.cache, slot, positions))

    # The last token made is never fed back, so it needs no slot.
    logits, cache = decoding.prefill(params, prompts, lengths, room - 1)
    params = unstacked(params)
    start = _State(
        made=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, room), decoding.pad_token, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        cache=cache,
    )
    first = record(start, logits, cache)
    end = jax.lax.while_loop(lambda s: (s.made < room) & ~jnp.all(s.stopped), step, first)
    return Generated(end.tokens, end.lengths)


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
        logits, cache = decoding.extend(layers_apart, tokens.ravel(), cache, made - 1, positions, shared)
        return logits.reshape(batch, num_beams, -1), cache

    logits, shared = decoding.prefill(params, prompts, lengths, 0)
    layers_apart = unstacked(params)
    return beam_search(
        step,
        logits,
        # The prompts' part is the same for all beams of a row. The last token made is never fed back, so it needs no slot.
        init_cache(decoding.decoder.config, batch * num_beams, decoding.max_new_tokens - 1),
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
