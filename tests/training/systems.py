"""A chain of three Gaussian components, small enough to train in milliseconds, and preferences on it."""

from pathlib import Path

import numpy as np

from sysdpo_jax import CompoundSystem, Gaussian, Node, PairBatch
from sysdpo_jax.training import read_metrics

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


def trained_rows(directory: Path) -> list[str]:
    """The rows of metrics.jsonl without what depends on the clock and the machine."""
    rows = read_metrics(directory / "metrics.jsonl")
    measured = ("throughput/", "memory/")
    return [repr({name: value for name, value in row.items() if not name.startswith(measured)}) for row in rows]
