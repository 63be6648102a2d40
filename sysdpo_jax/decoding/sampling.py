"""The loop that samples: places, each of which continues a prompt, until every prompt has had one.

Axes: n prompts, B places, N new tokens, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from sysdpo_jax.decoding.cached_model import CachedModel, Lengths, Prompts
from sysdpo_jax.decoding.draws import sample_token
from sysdpo_jax.models.decoder import KVCache, init_cache, unstacked

Settings = tuple[Float[Array, ""], Float[Array, ""]]
# A loop of token steps makes at least so many tokens before the next, with more slots, takes over; of so many at most.
STAGE, MAX_STAGES = 256, 2


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: int [batch, max_new_tokens], padded after each row's end.
        lengths: int [batch], which count a stop token that was produced.
    """

    tokens: Array
    lengths: Array


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampled(
    model: CachedModel,
    places: int,
    params: PyTree,
    prompts: Prompts,
    lengths: Lengths,
    keys: Key[Array, " batch"],
    settings: Settings,
) -> Generated:
    (number, width), room = prompts.shape, model.max_new_tokens
    # So many places must be idle before prompts that wait are put there, as many at a time as make a good product.
    together = places if places == number else max(1, places // 4)
    # The last token made is never fed back, so it needs no slot.
    slots = model.slots(width + room - 1)
    # Attention reads every slot that there is. While no slot is used twice, they can be few at first.
    stages = [model.slots(stage) for stage in _stages(width, slots)] if together == number else [slots]
    stops = jnp.array(model.stop_tokens, jnp.int32)
    apart = unstacked(model.decoder.config, params)

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
        logits, cache = model.extend(apart, state.token, state.cache, slot, positions, going[:, None])
        token = drawn(logits, state.prompt, made)
        return record(state._replace(at=state.at + 1, cache=cache), going, token)

    def fill(state: _State) -> _State:
        """Prompts that wait at idle places, with their first tokens. Their slots end where the next token is put."""
        [idle] = jnp.nonzero(state.prompt == number, size=together, fill_value=places)
        waiting = jnp.minimum(state.begun + jnp.arange(together), number)
        picked = jnp.minimum(waiting, number - 1)
        logits, own = model.prefill(params, prompts[picked], lengths[picked], stages[0] - width)

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
        tokens=jnp.full((number, room), model.pad_token, jnp.int32),
        lengths=jnp.zeros(number, jnp.int32),
        cache=init_cache(model.decoder.config, places, stages[0]),
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
