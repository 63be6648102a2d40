"""Random keys by name and by row."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray

from sysdpo_jax.typing import Keys


def named_key(key: Keys, name: str) -> PRNGKeyArray:
    """A key that depends on the name alone, so that adding a node or a phase does not change another's noise."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))


def row_keys(key: Keys, rows: int) -> Key[Array, "rows"]:
    """One key a row, made from a single key by the row's number; keys that are one a row already stay as they are.

    What a row draws from its own key does not depend on the rows beside it: cutting a batch changes no noise.
    """
    return key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
