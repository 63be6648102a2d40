"""Components with a closed form: small exact systems, routers, the theory tests, and what surrogates are checked by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs, RecordError
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Features, Keys, Params, Parents


@dataclass(frozen=True)
class Categorical(Component):
    """A table of logits: p(value | parents) = softmax(logits[*parents])[value].

    Values and parents are integers counted from 0.

    Args:
        num_values: How many values there are.
        parent_sizes: The same for each parent, in the order of the node's parents.
    """

    num_values: int
    parent_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        hold_tuples(self)

    def init(self, key: PRNGKeyArray) -> Params:
        return {"logits": jax.random.normal(key, (*self.parent_sizes, self.num_values))}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        if len(parents) != len(self.parent_sizes):
            raise RecordError(
                f"Categorical has parent_sizes for {len(self.parent_sizes)} parents but the node has {len(parents)} "
                f"({', '.join(parents) or 'none'}): give one size for each parent"
            )
        return np.stack([*self._columns(parents), _indices(values, self.num_values, "its own value")], axis=-1)

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        log_probs = jax.nn.log_softmax(params["logits"].astype(jnp.promote_types(params["logits"].dtype, jnp.float32)))
        return log_probs[tuple(jnp.moveaxis(features, -1, 0))]

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        return [int(value) for value in draw(key, self._logits(params, parents))]

    def candidates(self, params: Params, parents: Parents, number: int, key: PRNGKeyArray) -> list[list[Any]]:
        """The `number` likeliest values of each row, or all possible ones if there are fewer; the key is not used."""
        logits = np.asarray(self._logits(params, parents))
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :number]
        return [[int(v) for v in row if own[v] > -np.inf] for row, own in zip(order, logits, strict=True)]

    def _logits(self, params: Params, parents: Parents) -> Float[Array, "batch values"]:
        if not self.parent_sizes:
            return jnp.tile(params["logits"], (len(next(iter(parents.values()))), 1))
        return params["logits"][tuple(self._columns(parents))]

    def _columns(self, parents: Parents) -> list[np.ndarray]:
        sizes = zip(parents.items(), self.parent_sizes, strict=True)
        return [_indices(values, size, name) for (name, values), size in sizes]


def _indices(values: Sequence[Any], size: int, name: str) -> np.ndarray:
    # Each by itself: an array of all would make an integer of a boolean beside others.
    for row, value in enumerate(values):
        one = np.asarray(value) if np.isscalar(value) or isinstance(value, np.ndarray) else np.zeros(1, object)
        if one.ndim or not np.issubdtype(one.dtype, np.integer):
            raise RecordError(f"Categorical: {name} in row {row} is {value!r}: it must be an integer")
    column = np.array([int(value) for value in values], object)
    bad = np.flatnonzero((column < 0) | (column >= size))
    if bad.size:
        raise RecordError(f"Categorical: {name} is {column[bad[0]]} in row {bad[0]}, outside 0..{size - 1}")
    return column.astype(np.int32)


@dataclass(frozen=True)
class Gaussian(Component):
    """A linear-Gaussian node: p(value | parents) = N(value; parents @ kernel + bias, scale^2 I).

    The parents are concatenated to one vector.

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

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        error = (features["value"] - self._mean(params, features["parents"])) / self.scale
        normaliser = self.size * (0.5 * math.log(2 * math.pi) + math.log(self.scale))
        return -0.5 * jnp.sum(error**2, axis=-1) - normaliser

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        mean = self._mean(params, self._parents(parents))
        by_row = jax.vmap(lambda own: jax.random.normal(own, mean.shape[1:]))
        noise = by_row(key) if key.ndim else jax.random.normal(key, mean.shape)
        return list(np.asarray(mean + self.scale * noise))

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
