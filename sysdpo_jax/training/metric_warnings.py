"""Warnings in words about what the rows of a run's metrics show."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Rows that a warning looks back on, and the share of the margin that a node may carry.
WINDOW = 10
SHARE = 0.95
MARGINS, CHOSEN = "rewards/margins/", "rewards/chosen/"


class MetricWarnings:
    """Looks at the last rows and gives each warning once in a run.

    nodes: whose figures to look for in the rows. history: the rows of the run so far.
    """

    def __init__(self, nodes: Sequence[str] = (), history: Iterable[Mapping[str, Any]] = ()):
        self._nodes = tuple(nodes)
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._given: set[str] = set()
        for row in history:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What there is to warn of after one more row {"step": k, metric: value}."""
        if "rewards/chosen" not in row:
            # An evaluation, or an objective of other metrics.
            return []
        self._rows.append(row)
        if len(self._rows) < WINDOW:
            return []
        found = {"share": self._one_node(), "winner": self._falling()}
        new = {kind: text for kind, text in found.items() if text is not None and kind not in self._given}
        self._given.update(new)
        return list(new.values())

    def _one_node(self) -> str | None:
        """One node has nearly all of the margin: the others learn next to nothing."""
        sizes = {name: abs(self._values(f"{MARGINS}{name}").mean()) for name in self._with(MARGINS)}
        whole = sum(sizes.values())
        if len(sizes) < 2 or not whole > 0:
            return None
        name = max(sizes, key=sizes.__getitem__)
        if not sizes[name] > SHARE * whole:
            return None
        return (
            f"{self._where}: the node {name!r} carries {100 * sizes[name] / whole:.1f}% of the margin, so that the "
            f"others learn next to nothing: lower its weight, or raise theirs"
        )

    def _falling(self) -> str | None:
        """The chosen values are less likely than under the reference in every row: batches alone would change sign."""
        values = self._values("rewards/chosen")
        if not (values < 0).all():
            return None
        nodes = [name for name in self._with(CHOSEN) if self._values(f"{CHOSEN}{name}").mean() < 0]
        return (
            f"{self._where}: rewards/chosen is below 0, {values.mean():.3g} in the mean: the policy gives the chosen "
            f"values less probability than the reference does, in {', '.join(map(repr, nodes)) or 'no single node'}: "
            "add an sft term for the node, lower the learning rate, or raise beta"
        )

    @property
    def _where(self) -> str:
        return f"steps {self._rows[0]['step']} to {self._rows[-1]['step']}"

    def _with(self, figure: str) -> list[str]:
        """The nodes that the last row has this figure of: not frozen ones."""
        return [name for name in self._nodes if f"{figure}{name}" in self._rows[-1]]

    def _values(self, metric: str) -> np.ndarray:
        """NaN, which compares as False, where a value was not finite."""
        return np.array([row.get(metric) for row in self._rows], np.float64)
