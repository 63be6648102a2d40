"""Random keys by name."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from sysdpo_jax.typing import Keys


def named_key(key: Keys, name: str) -> PRNGKeyArray:
    """A key that depends on the name alone, so that adding a node or a phase does not change another's noise."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
