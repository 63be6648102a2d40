"""Small discrete systems whose runs can be enumerated, each with its joint distribution written out by hand.

Axes: X values of the input x, S runs s (the values of all nodes), Z outcomes z (the values of the last node).
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sysdpo_jax import Categorical, CompoundSystem, Node
from sysdpo_jax.typing import Params

Tables = Mapping[str, Any]


@dataclass(frozen=True)
class ExactSystem:
    """A system with one input x in 0..num_inputs-1 and Categorical nodes.

    joint: tables of log-probabilities `{params_key: [*parents, value]}` -> log p(s | x), [X, *values of the nodes]. It
    does not know the graph: it is what the graph is checked against, and what the gaps are measured with.
    values: the node of each axis of s; a plate has one axis a copy. z is the node of the last axis.
    """

    name: str
    num_inputs: int
    system: CompoundSystem
    values: tuple[str, ...]
    joint: Callable[[Tables], Any]

    def log_prob(self, params: Params) -> Float[np.ndarray, "x s"]:
        """log p(s | x) of every run in float64."""
        return np.asarray(self.joint(log_tables(params))).reshape(self.num_inputs, -1)

    def outcome_log_prob(self, log_prob: Float[np.ndarray, "x s"]) -> Float[np.ndarray, "x z"]:
        """log p(z | x): the values that lead to the same z are summed out."""
        outcomes = self.outcomes()
        return np.log(np.stack([np.exp(log_prob[:, outcomes == z]).sum(1) for z in range(outcomes.max() + 1)], axis=1))

    def runs(self) -> list[tuple[int, ...]]:
        """Every s, ordered as the S axis."""
        tables = [self.system.node(name).component for name in self.values]
        return list(itertools.product(*(range(t.num_values) for t in tables if isinstance(t, Categorical))))

    def outcomes(self) -> np.ndarray:
        """[S] the number of each run's z."""
        last = [name == self.values[-1] for name in self.values]
        return np.unique(np.array(self.runs())[:, last], axis=0, return_inverse=True)[1]

    def records(self) -> list[dict[str, Any]]:
        """Every (x, s) as the library takes it, x first."""
        return [self._record(x, s) for x in range(self.num_inputs) for s in self.runs()]

    def _record(self, x: int, s: tuple[int, ...]) -> dict[str, Any]:
        record: dict[str, Any] = {"x": x}
        for name, value in zip(self.values, s, strict=True):
            record[name] = [*record.get(name, []), value] if self.system.node(name).plate else value
        return record


def gap(rewards: Float[np.ndarray, "x n"], log_ratio: Float[np.ndarray, "x n"], beta: float) -> float:
    """Largest residual over all x and pairs. Log-odds and log-ratios are differences, so it is a range for each x."""
    return float(np.ptp(rewards - beta * log_ratio, axis=1).max())


def log_tables(params: Params) -> dict[str, np.ndarray]:
    """The logits of every node, normalised, in float64."""
    logits = {key: np.asarray(tree["logits"], np.float64) for key, tree in params.items()}
    # A minimum may lie at infinity, where exp alone would overflow.
    shifted = {key: table - table.max(-1, keepdims=True) for key, table in logits.items()}
    return {key: table - np.log(np.exp(table).sum(-1, keepdims=True)) for key, table in shifted.items()}


def chain(name: str, num_inputs: int, intermediates: int = 3) -> ExactSystem:
    """x -> y -> z with three outcomes."""
    return ExactSystem(
        name=name,
        num_inputs=num_inputs,
        system=CompoundSystem(
            ("x",),
            (
                Node("y", Categorical(intermediates, (num_inputs,)), ("x",)),
                Node("z", Categorical(3, (intermediates,)), ("y",)),
            ),
        ),
        values=("y", "z"),
        joint=lambda p: p["y"][:, :, None] + p["z"][None],
    )


DIAMOND = ExactSystem(
    name="diamond",
    num_inputs=2,
    system=CompoundSystem(
        ("x",),
        (
            Node("y", Categorical(2, (2,)), ("x",)),
            Node("u", Categorical(2, (2,)), ("y",)),
            Node("v", Categorical(2, (2,)), ("y",)),
            Node("z", Categorical(3, (2, 2)), ("u", "v")),
        ),
    ),
    values=("y", "u", "v", "z"),
    joint=lambda p: (
        p["y"][:, :, None, None, None] + p["u"][:, :, None, None] + p["v"][:, None, :, None] + p["z"][None, None]
    ),
)

PLATE = ExactSystem(
    name="plate",
    num_inputs=2,
    system=CompoundSystem(
        ("x",), (Node("y", Categorical(2, (2,)), ("x",)), Node("z", Categorical(3, (2,)), ("y",), plate=2))
    ),
    values=("y", "z", "z"),
    joint=lambda p: p["y"][:, :, None, None] + p["z"][:, :, None] + p["z"][:, None, :],
)

SHARED = ExactSystem(
    name="shared_weights",
    num_inputs=3,
    system=CompoundSystem(
        ("x",),
        (
            Node("y", Categorical(3, (3,)), ("x",), params="table"),
            Node("z", Categorical(3, (3,)), ("y",), params="table"),
        ),
    ),
    values=("y", "z"),
    joint=lambda p: p["table"][:, :, None] + p["table"][None],
)

SYSTEMS = (chain("chain_one_x", num_inputs=1), chain("chain", num_inputs=2), DIAMOND, PLATE, SHARED)
