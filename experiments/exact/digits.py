"""Sets Y(x) of intermediates y that are written as three digits, searched for digit by digit or sampled."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from experiments.exact.systems import log_tables
from sysdpo_jax import BeamSearch
from sysdpo_jax.decoding import Penalties, beam_search
from sysdpo_jax.typing import Params

BASE, DIGITS = 3, 3
VALUES = BASE**DIGITS


@dataclass(frozen=True)
class Searched:
    """The `number` beams of a (diverse) beam search, like a language model's over tokens."""

    search: BeamSearch

    def draw(self, params: Params, number: int, key: PRNGKeyArray) -> Bool[np.ndarray, "x values"]:
        """Which y are in Y(x); the key is not used."""
        tables = jnp.asarray(prefix_tables(log_tables(params)["y"]), jnp.float32)
        values, valid = _search(tables, self.search.penalties(), number, self.search.groups(number))
        sets = np.zeros((len(tables), VALUES), bool)
        rows, places = np.nonzero(valid)
        sets[rows, np.asarray(values)[rows, places]] = True
        return sets


@dataclass(frozen=True)
class Sampled:
    """`number` independent samples of p(y | x), of which equal ones are one member of Y(x)."""

    def draw(self, params: Params, number: int, key: PRNGKeyArray) -> Bool[np.ndarray, "x values"]:
        """Which y are in Y(x)."""
        logits = params["y"]["logits"]
        # Always as many, so that a larger Y(x) holds the smaller one's samples.
        values = np.asarray(jax.random.categorical(key, logits, shape=(VALUES, len(logits))))[:number]
        sets = np.zeros((len(logits), VALUES), bool)
        sets[np.arange(len(logits)), values] = True
        return sets


def prefix_tables(log_prob: Float[np.ndarray, "x values"]) -> Float[np.ndarray, "x prefixes base"]:
    """log p(next digit, prefix | x) for every prefix of less than three digits; normalised it is the conditional.

    The prefixes are ordered by length, then by their number in base 3, first digit first: 0 is the empty one and n has
    the continuations 3 n + 1, 3 n + 2 and 3 n + 3.
    """
    levels = [
        np.logaddexp.reduce(log_prob.reshape(len(log_prob), BASE**length, BASE, -1), axis=-1)
        for length in range(DIGITS)
    ]
    return np.concatenate(levels, axis=1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search(
    tables: Float[Array, "x prefixes base"], penalties: Penalties, num_beams: int, num_groups: int
) -> tuple[Int[Array, "x beams"], Bool[Array, "x beams"]]:
    """The values that the beams spell, and which beams are valid."""

    def step(tokens: Array, parents: Array | None, prefix: Array, made: Array) -> Any:
        kept = prefix if parents is None else jnp.take_along_axis(prefix, parents, axis=1)
        prefix = kept * BASE + tokens + 1
        return jnp.take_along_axis(tables, prefix[..., None], axis=1), prefix

    beams = beam_search(
        step,
        tables[:, 0],
        jnp.zeros((len(tables), num_beams), jnp.int32),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=DIGITS,
        stop_tokens=(),
        pad_token=0,
    )
    powers = jnp.array([BASE**place for place in reversed(range(DIGITS))], jnp.int32)
    return jnp.sum(beams.tokens * powers, axis=-1), beams.valid
