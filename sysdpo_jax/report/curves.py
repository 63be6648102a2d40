"""Learning curves, and in words what there is to see of those in which nothing changes; `charts` draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Line = Float[np.ndarray, "points"]
Values = tuple[int | float | None, ...]

# Values that differ by this share of the greatest are the same but for float32's rounding.
ROUNDING = 1e-6


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
    """

    title: str
    curves: tuple[Curve, ...]

    @property
    def changes(self) -> bool:
        """Whether a curve has two values that differ by more than rounding."""
        return any(_differ(curve.finite) for curve in self.curves)

    @property
    def sentence(self) -> str:
        """What there is to see where nothing changes: "clipped: writer 0 at all 12 steps"."""
        return f"{self.title}: {'; '.join(_constant(curve, self.title) for curve in self.curves)}"


def as_floats(values: Sequence[int | float | None]) -> Line:
    """None becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _differ(values: Line) -> bool:
    return len(values) > 1 and float(values.max() / 2 - values.min() / 2) > ROUNDING * float(np.abs(values).max()) / 2


def _constant(curve: Curve, title: str) -> str:
    name, finite = "" if curve.name == title else f"{curve.name} ", curve.finite
    if len(finite) == 0:
        return f"{name}no finite value"
    steps = [step for step, value in zip(curve.steps, as_floats(curve.values), strict=True) if math.isfinite(value)]
    where = f"at step {steps[0]:g} alone" if len(steps) == 1 else f"at all {len(steps)} steps"
    return f"{name}{finite[0]:.4g} {where}{curve.label.removeprefix(curve.name)}"
