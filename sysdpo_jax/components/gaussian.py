"""A linear-Gaussian node: the closed form that surrogates and systems are checked against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.typing import Features, Keys, Params, Parents


@dataclass(frozen=True)
class Gaussian(Component):
    """p(value | parents) = N(value; parents @ kernel + bias, scale^2 I), the parents concatenated to one vector.

    Args:
        size: Length of the value (1: a number or a vector of one).
        parent_size: Summed length of the parents.
        scale: The fixed standard deviation, in the units of the value.
    """

    size: int
    parent_size: int
    scale: float = 1.0

    def init(self, key: PRNGKeyArray) -> Params:
        kernel = jax.random.normal(key, (self.parent_size, self.size)) / math.sqrt(self.parent_size)
        return {"kernel": kernel, "bias": jnp.zeros(self.size)}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        return {"value": _rows(values, self.size, "its own value"), "parents": self._parents(parents)}

    def log_prob(self, params: Params, features: Features, key: Keys) -> Float[Array, "batch"]:
        error = (features["value"] - self._mean(params, features["parents"])) / self.scale
        normaliser = self.size * (0.5 * math.log(2 * math.pi) + math.log(self.scale))
        return -0.5 * jnp.sum(error**2, axis=-1) - normaliser

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        mean = self._mean(params, self._parents(parents))
        return list(np.asarray(mean + self.scale * jax.random.normal(key, mean.shape)))

    def _mean(self, params: Params, parents: Float[Array | np.ndarray, "batch parent"]) -> Float[Array, "batch size"]:
        return parents @ params["kernel"] + params["bias"]

    def _parents(self, parents: Parents) -> np.ndarray:
        columns = [_numbers(values, f"its parent {name!r}") for name, values in parents.items()]
        return _rows(np.concatenate(columns, axis=-1), self.parent_size, "its parents")


def _numbers(values: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    """A row of numbers for each value."""
    try:
        return np.asarray(values, np.float32).reshape(len(values), -1)
    except (TypeError, ValueError) as error:
        raise RecordError(f"Gaussian: {name} is no number or list of numbers ({error}): write numbers") from None


def _rows(values: Sequence[Any] | np.ndarray, size: int, name: str) -> np.ndarray:
    rows = _numbers(values, name)
    if rows.shape[1] != size:
        raise RecordError(f"Gaussian: {name} has {rows.shape[1]} numbers a row, expected {size}")
    if not np.isfinite(rows).all():
        raise RecordError(f"Gaussian: {name} is not finite in row {int(np.argwhere(~np.isfinite(rows))[0, 0])}")
    return rows
