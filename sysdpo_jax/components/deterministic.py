"""Nodes that follow from their parents: no parameters, no part in the loss."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs
from sysdpo_jax.typing import Features, Keys, Params, Parents


class Deterministic(Component):
    """A component without parameters, whose log-ratio is exactly 0: a record may lack its value."""

    def init(self, key: PRNGKeyArray) -> Params:
        return {}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        return np.zeros((len(values), 0), np.float32)

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        return jnp.zeros(features.shape[0])

    def candidates(self, params: Params, parents: Parents, number: int, key: Keys) -> list[list[Any]]:
        """The one value that there is for each row."""
        return [[value] for value in self.sample(params, parents, key)]
