"""Learning curves as inline SVG: a pale line of the values, a strong one of their moving average, a pale band."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sysdpo_jax.report.markup import Markup, element, join

Line = Float[np.ndarray, "points"]
Values = tuple[int | float | None, ...]

# The drawing, in units of its viewBox.
WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
COLOURS = 8
MAX_POINTS = 400
# The moving average spans about this share of a curve.
SMOOTHING = 0.05
# Values that differ by this share of the greatest are the same but for float32's rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Curve:
    """Values over steps; None or a value that is not finite leaves a gap. Raises ValueError if the lengths differ.

    band: the lower and the upper end of each value's interval, None for no band.
    """

    name: str
    steps: tuple[int | float, ...]
    values: Values
    band: tuple[Values, Values] | None = None

    def __post_init__(self) -> None:
        for values in (self.values, *(self.band or ())):
            if len(self.steps) != len(values):
                raise ValueError(f"curve {self.name!r} has {len(self.steps)} steps and {len(values)} values")


@dataclass(frozen=True)
class Figure:
    """Curves over one pair of axes."""

    title: str
    curves: tuple[Curve, ...]
    x_label: str = "step"


def html_figures(figures: Sequence[Figure]) -> Markup:
    """The drawings, and below them a sentence for each figure in which nothing changes: there is no line to see."""
    drawn = [html_figure(figure) for figure in figures if changes(figure)]
    said = [element("li", constant_sentence(figure)) for figure in figures if not changes(figure)]
    charts = [element("div", *drawn, class_="charts")] if drawn else []
    return join(*charts, *([element("ul", *said, class_="constants")] if said else []))


def changes(figure: Figure) -> bool:
    """Whether a curve of the figure has two values that differ by more than rounding."""
    return any(_differ(_finite(curve)) for curve in figure.curves)


def constant_sentence(figure: Figure) -> str:
    """What there is to see of a figure in which nothing changes: "clipped: writer 0 at all 12 steps"."""
    return f"{figure.title}: {'; '.join(_constant(curve, figure.title) for curve in figure.curves)}"


def html_figure(figure: Figure) -> Markup:
    """A <figure> with the drawing, its title and a legend. figure: one that `changes`."""
    items = [
        element("li", f"{curve.name}{_gaps(curve)}", class_=_style(number))
        for number, curve in enumerate(figure.curves)
    ]
    return element(
        "figure",
        element("figcaption", figure.title),
        _draw(figure),
        element("ul", *items, class_="legend"),
        class_="chart",
    )


def ticks(low: int | float, high: int | float) -> list[float]:
    """Two to seven round numbers (1, 2 or 5 times a power of ten apart) from low to high; low < high."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _finite(curve: Curve) -> Line:
    values = _floats(curve.values)
    return values[np.isfinite(values)]


def _differ(values: Line) -> bool:
    return len(values) > 1 and float(np.ptp(values)) > ROUNDING * float(np.abs(values).max())


def _constant(curve: Curve, title: str) -> str:
    name, finite = "" if curve.name == title else f"{curve.name} ", _finite(curve)
    if len(finite) == 0:
        return f"{name}no finite value"
    steps = [step for step, value in zip(curve.steps, _floats(curve.values), strict=True) if math.isfinite(value)]
    where = f"at step {steps[0]:g} alone" if len(steps) == 1 else f"at all {len(steps)} steps"
    return f"{name}{finite[0]:.4g} {where}{_gaps(curve)}"


def _gaps(curve: Curve) -> str:
    gaps = len(curve.values) - len(_finite(curve))
    return f" ({gaps} values not finite)" if gaps else ""


def _style(number: int) -> str:
    """A colour for each of the first curves, then the same colours dashed."""
    return f"curve c{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _draw(figure: Figure) -> Markup:
    x_low, x_high = _range([_floats(curve.steps) for curve in figure.curves])
    y_low, y_high = _range([_floats(y) for curve in figure.curves for y in (curve.values, *(curve.band or ()))])
    x_scale, y_scale = (WIDTH - LEFT - RIGHT) / (x_high - x_low), (HEIGHT - TOP - BOTTOM) / (y_high - y_low)

    def place(x: Line, y: Line) -> tuple[Line, Line]:
        return LEFT + (x - x_low) * x_scale, HEIGHT - BOTTOM - (y - y_low) * y_scale

    grid = []
    for value in ticks(y_low, y_high):
        y = HEIGHT - BOTTOM - (value - y_low) * y_scale
        grid.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
        grid.append(element("text", f"{value:g}", x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for value in ticks(x_low, x_high):
        x = LEFT + (value - x_low) * x_scale
        grid.append(element("text", f"{value:g}", x=f"{x:.1f}", y=HEIGHT - BOTTOM + 15, text_anchor="middle"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    grid.append(element("text", figure.x_label, x=middle, y=HEIGHT - 4, text_anchor="middle"))
    lines = []
    for number, curve in enumerate(figure.curves):
        steps, values = _floats(curve.steps), _floats(curve.values)
        if curve.band is not None:
            low, high = map(_floats, curve.band)
            seen = np.isfinite(low) & np.isfinite(high)
            there_and_back = np.concatenate([steps[seen], steps[seen][::-1]])
            outline = _path(*place(there_and_back, np.concatenate([high[seen], low[seen][::-1]])))
            lines.append(element("path", d=outline, class_=f"{_style(number)} band"))
        for kind, shown in (("raw", values), ("mean", _smooth(values))):
            # A long curve is drawn at some of its points; the average has seen all of them.
            rows = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
            path = _path(*place(steps[rows], shown[rows]))
            lines.append(element("path", d=path, class_=f"{_style(number)} {kind}"))
    title = element("title", f"{figure.title} over {figure.x_label}")
    return element("svg", title, *grid, *lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _floats(values: Sequence[int | float | None]) -> Line:
    """None becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _range(parts: Sequence[Float[np.ndarray, "_"]]) -> tuple[float, float]:
    """Lowest and highest finite value."""
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return float(values.min()), float(values.max())


def _smooth(values: Line) -> Line:
    """Centred moving average over the finite values; the gaps stay."""
    kernel = np.ones(2 * int(SMOOTHING * len(values) / 2) + 1)
    seen = np.isfinite(values)
    if not seen.any():
        return values
    total = np.convolve(np.where(seen, values, 0), kernel, "same")
    count = np.convolve(seen.astype(np.float64), kernel, "same")
    return np.where(seen, total / np.maximum(count, 1), math.nan)


def _path(x: Line, y: Line) -> str:
    """Lines through the finite points, broken at the others; a point alone is a line of no length, seen as a dot."""
    parts, drawing = [], False
    for across, down in zip(x, y, strict=True):
        if not math.isfinite(down):
            drawing = False
            continue
        parts.append(f"{'L' if drawing else f'M{across:.1f} {down:.1f}L'}{across:.1f} {down:.1f}")
        drawing = True
    return "".join(parts)
