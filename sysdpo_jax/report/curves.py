"""Learning curves of what a run logged; docs/metrics.md has the names of its figures, and `charts` draws them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

Line = Float[np.ndarray, "points"]
Values = tuple[int | float | None, ...]
# Rows as `training.read_metrics` returns them, each with "step".
Rows = Sequence[Mapping[str, Any]]

# Values that differ by this share of the greatest are the same but for float32's rounding.
ROUNDING = 1e-6

LEARNING = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
NODE_MARGIN = "rewards/margins/"
EVALUATED, LOW, HIGH = "eval/", "/low", "/high"
SPLITS = {
    NODE_MARGIN: "margin by node",
    "margin_share/": "share of the margin by node",
    "rewards/chosen/": "reward of the chosen by node",
    "drift/kl/": "drift by node: KL estimate (nats)",
    "drift/mse/": "drift by node: squared error",
    "grad_norm/": "gradient norm by component",
    "clipped/": "clipped gradients by component",
}


@dataclass(frozen=True)
class Curve:
    """Values over steps.

    Args:
        name: In the legend.
        steps: Of the values.
        values: None or one that is not finite leaves a gap.
        band: The lower and the upper end of each value's interval; None for no band.

    Raises:
        ValueError: If the lengths differ.
    """

    name: str
    steps: tuple[int | float, ...]
    values: Values
    band: tuple[Values, Values] | None = None

    def __post_init__(self) -> None:
        for values in (self.values, *(self.band or ())):
            if len(self.steps) != len(values):
                raise ValueError(f"curve {self.name!r} has {len(self.steps)} steps and {len(values)} values")

    @property
    def finite(self) -> Line:
        """The values that are finite."""
        values = as_floats(self.values)
        return values[np.isfinite(values)]

    @property
    def label(self) -> str:
        """The name, and how many values are not finite."""
        gaps = len(self.values) - len(self.finite)
        return f"{self.name} ({gaps} values not finite)" if gaps else self.name


@dataclass(frozen=True)
class Figure:
    """Curves over the steps, on one pair of axes.

    Args:
        title: Above them.
        curves: One or several.
        marks: Steps at each of which a thin vertical line is drawn.
    """

    title: str
    curves: tuple[Curve, ...]
    marks: tuple[int | float, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether a curve has two values that differ by more than rounding."""
        return any(np.ptp(c.finite / 2) > ROUNDING * np.abs(c.finite).max() / 2 for c in self.curves if len(c.finite))

    @property
    def sentence(self) -> str:
        """What there is to see where nothing changes: "clipped: writer 0 at all 12 steps"."""
        return f"{self.title}: {'; '.join(_constant(curve, self.title) for curve in self.curves)}"


def as_floats(values: Sequence[int | float | None]) -> Line:
    """None becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _constant(curve: Curve, title: str) -> str:
    name, finite = "" if curve.name == title else f"{curve.name} ", curve.finite
    if len(finite) == 0:
        return f"{name}no finite value"
    steps = [step for step, value in zip(curve.steps, as_floats(curve.values), strict=True) if math.isfinite(value)]
    where = f"at step {steps[0]:g} alone" if len(steps) == 1 else f"at all {len(steps)} steps"
    return f"{name}{finite[0]:.4g} {where}{curve.label.removeprefix(curve.name)}"


def learning_figures(runs: Mapping[str, Rows]) -> tuple[Figure, ...]:
    """Compare runs: loss, accuracy, margin and evaluations of all, then one figure of each run that compares its nodes.

    Args:
        runs: `{run: rows of its metrics}`; metrics that are absent are left out.

    Returns:
        The figures.
    """
    titles = LEARNING | {metric: metric for rows in runs.values() for metric in _evaluations(rows)}
    together = [
        Figure(title, tuple(_curve(run, rows, metric) for run, rows in runs.items() if _has(rows, metric)))
        for metric, title in titles.items()
    ]
    by_node = [split_figure(f"margin by node, {run}", rows, NODE_MARGIN) for run, rows in runs.items()]
    return tuple(figure for figure in (*together, *by_node) if figure.curves)


def run_figures(rows: Rows, marks: Sequence[int | float] = ()) -> tuple[Figure, ...]:
    """All there is to see of one run: loss, accuracy, margin, its evaluations, and the splits by node and component.

    Args:
        rows: Of its metrics.
        marks: Steps with a vertical line, such as those at which the rounds of an online run begin.

    Returns:
        The figures.
    """
    titles = LEARNING | {metric: metric for metric in _evaluations(rows)}
    single = [Figure(title, (_curve(title, rows, metric),)) for metric, title in titles.items() if _has(rows, metric)]
    splits = [split_figure(title, rows, prefix) for prefix, title in SPLITS.items()]
    return tuple(replace(figure, marks=tuple(marks)) for figure in (*single, *splits) if figure.curves)


def split_figure(title: str, rows: Rows, prefix: str) -> Figure:
    """A curve for every metric "<prefix><name>", called by that name.

    Args:
        title: Of the figure.
        rows: Of a run's metrics.
        prefix: Which metrics.

    Returns:
        The figure, without curves where there is no such metric.
    """
    metrics = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    return Figure(title, tuple(_curve(metric.removeprefix(prefix), rows, metric) for metric in metrics))


def run_warnings(rows: Rows) -> tuple[str, ...]:
    """What a run warned of.

    Args:
        rows: Of its metrics.

    Returns:
        The texts, in the order of its steps.
    """
    return tuple(text for row in rows for text in row.get("warnings", ()))


def _evaluations(rows: Rows) -> Iterator[str]:
    """The figures that were evaluated, without the ends of their intervals."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(EVALUATED))
    return (name for name in names if not name.endswith((LOW, HIGH)))


def _has(rows: Rows, metric: str) -> bool:
    return any(metric in row for row in rows)


def _curve(name: str, rows: Rows, metric: str) -> Curve:
    kept = [row for row in rows if metric in row]
    low, high = (tuple(row.get(f"{metric}{end}") for row in kept) for end in (LOW, HIGH))
    known = _has(kept, f"{metric}{LOW}") and _has(kept, f"{metric}{HIGH}")
    values = tuple(row[metric] for row in kept)
    return Curve(name, tuple(row["step"] for row in kept), values, (low, high) if known else None)
