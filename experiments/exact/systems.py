"""Small discrete systems whose runs can be enumerated, each with its joint distribution written out by hand.

Axes: X values of the input x, S runs s (the values of all nodes), Z outcomes z (the values of the last node).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sysdpo_jax import Categorical, CompoundSystem, Loop, Node, Switch, Tool
from sysdpo_jax.typing import Params

Tables = Mapping[str, Any]


@dataclass(frozen=True)
class ExactSystem:
    """A system with one input x in 0..num_inputs-1 and Categorical nodes.

    joint: tables of log-probabilities `{params_key: [*parents, value]}` -> log p(s | x), [X, *values of the nodes]. It
    does not know the graph: it is what the graph is checked against, and what the gaps are measured with.
    values: the node of each axis of s; a plate has one axis a copy, and a loop one a turn. z is the node of the last
    axis, or whichever of `ends` ran. every: all s where they are no product of the nodes' values, -1 for what did not
    run.
    """

    name: str
    num_inputs: int
    system: CompoundSystem
    values: tuple[str, ...]
    joint: Callable[[Tables], Any]
    ends: tuple[str, ...] = ()
    every: tuple[tuple[int, ...], ...] = ()

    def log_prob(self, params: Params) -> Float[np.ndarray, "x s"]:
        """log p(s | x) of every run in float64."""
        return np.asarray(self.joint(log_tables(params))).reshape(self.num_inputs, -1)

    def outcome_log_prob(self, log_prob: Float[np.ndarray, "x s"]) -> Float[np.ndarray, "x z"]:
        """log p(z | x): the values that lead to the same z are summed out."""
        outcomes = self.outcomes()
        return np.log(np.stack([np.exp(log_prob[:, outcomes == z]).sum(1) for z in range(outcomes.max() + 1)], axis=1))

    def runs(self) -> list[tuple[int, ...]]:
        """Every s, ordered as the S axis."""
        if self.every:
            return list(self.every)
        tables = [self.system.node(name).component for name in self.values]
        return list(itertools.product(*(range(t.num_values) for t in tables if isinstance(t, Categorical))))

    def outcomes(self) -> np.ndarray:
        """[S] the number of each run's z."""
        last = [name in (self.ends or self.values[-1:]) for name in self.values]
        ends = np.array(self.runs())[:, last]
        # Of the branches of a switch one ran.
        return np.unique(ends.max(1, keepdims=True) if self.ends else ends, axis=0, return_inverse=True)[1]

    def records(self) -> list[dict[str, Any]]:
        """Every (x, s) as the library takes it, x first."""
        return [self._record(x, s) for x in range(self.num_inputs) for s in self.runs()]

    def _record(self, x: int, s: tuple[int, ...]) -> dict[str, Any]:
        record: dict[str, Any] = {"x": x}
        for name, value in zip(self.values, s, strict=True):
            node = self.system.node(name)
            if value < 0:
                continue
            if node.loop is not None:
                record[node.loop] = [*record.get(node.loop, []), {name: value}]
            else:
                record[name] = [*record.get(name, []), value] if node.plate else value
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

# route 0: an answer at once; route 1: a draft, then the answer.
SWITCH = ExactSystem(
    name="switch",
    num_inputs=2,
    system=CompoundSystem(
        ("x",),
        (
            Node("route", Categorical(2, (2,)), ("x",)),
            Node("short", Categorical(3, (2,)), ("x",)),
            Node("draft", Categorical(2, (2,)), ("x",)),
            Node("long", Categorical(3, (2,)), ("draft",)),
            Node("answer", Switch((0, 1)), ("route", "short", "long")),
        ),
    ),
    values=("route", "short", "draft", "long"),
    joint=lambda p: _switch_joint(p),
    ends=("short", "long"),
    every=(
        *((0, short, -1, -1) for short in range(3)),
        *((1, -1, draft, long) for draft in range(2) for long in range(3)),
    ),
)


def _switch_joint(p: Tables) -> Any:
    route, short, draft, long = np.array(SWITCH.every).T
    long_way = p["draft"][:, draft] + p["long"][draft, long]
    return p["route"][:, route] + (route == 0) * p["short"][:, short] + (route == 1) * long_way


def state_of(x: int, turns: Sequence[Mapping[str, int]]) -> int:
    """What an action, and the answer, depend on: of input and earlier actions."""
    return (x + sum(turn["action"] for turn in turns)) % 3


def stops(turn: Mapping[str, int]) -> bool:
    """Action 0 ends the turns."""
    return turn["action"] == 0


# Up to two actions of one table; then an answer.
LOOP = ExactSystem(
    name="two_turn_loop",
    num_inputs=2,
    system=CompoundSystem(
        ("x",),
        (
            Loop(
                "turns",
                (
                    Node("state", Tool(state_of), ("x", "turns")),
                    Node("action", Categorical(3, (3,)), ("state",), params="agent"),
                ),
                turns=2,
                until=stops,
            ),
            Node("end", Tool(state_of), ("x", "turns")),
            Node("z", Categorical(2, (3,)), ("end",)),
        ),
    ),
    values=("action", "action", "z"),
    joint=lambda p: _loop_joint(p),
    every=(
        *((0, -1, z) for z in range(2)),
        *((first, second, z) for first in (1, 2) for second in range(3) for z in range(2)),
    ),
)


def _loop_joint(p: Tables) -> Any:
    x = np.arange(2)[:, None]
    first, second, z = np.array(LOOP.every).T
    went_on = second >= 0
    after = (x + first + np.maximum(second, 0)) % 3
    return p["agent"][x, first] + went_on * p["agent"][(x + first) % 3, second] + p["z"][after, z]


SYSTEMS = (chain("chain_one_x", num_inputs=1), chain("chain", num_inputs=2), DIAMOND, PLATE, SHARED, SWITCH, LOOP)
