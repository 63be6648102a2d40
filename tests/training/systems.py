"""A chain of three Gaussian components, small enough to train in milliseconds, and preferences on it."""

import numpy as np

from sysdpo_jax import CompoundSystem, Gaussian, Node, PairBatch

CHAIN = CompoundSystem(
    ("x",),
    (
        Node("a", Gaussian(3, 2), ("x",)),
        Node("b", Gaussian(2, 3), ("a",), weight=2.0),
        Node("c", Gaussian(1, 2), ("b",)),
    ),
)


def pairs(rows: int, seed: int = 0) -> PairBatch:
    """Random values on both sides: no signal, but gradients everywhere."""
    rng = np.random.default_rng(seed)

    def side():
        sizes = {"x": 2, "a": 3, "b": 2, "c": 1}
        return CHAIN.prepare([{k: rng.normal(size=n) for k, n in sizes.items()} for _ in range(rows)])

    return PairBatch(side(), side())
