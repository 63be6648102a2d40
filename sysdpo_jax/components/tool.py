"""A deterministic node: a parser, a template, a retriever, a call to a tool. No parameters, log-ratio exactly 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import Component, batch_size
from sysdpo_jax.typing import Features, Keys, Params, Parents


@dataclass(frozen=True)
class Tool(Component):
    """`function(*parent_values) -> value`, one row at a time, in the order of the node's parents.

    In a node with `plate=n` whose parents are not plates the function is called once a row and returns all n values
    (an answer split into three captions). With a plate among the parents it is called once a copy.
    Hashed by the function's identity: use a module-level function, not a lambda made anew for each system.
    """

    function: Callable[..., Any]

    def init(self, key: PRNGKeyArray) -> Params:
        return {}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        return np.zeros((len(values), 0), np.float32)

    def log_prob(self, params: Params, features: Features, key: Keys) -> Float[Array, "batch"]:
        return jnp.zeros(features.shape[0])

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        rows = range(batch_size(parents, "Tool"))
        return [self.function(*(values[row] for values in parents.values())) for row in rows]
