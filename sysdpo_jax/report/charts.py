"""Curves as inline SVG, by matplotlib: a pale line of the values, a strong one of their moving average, a pale band.

matplotlib takes a second to import, so this module is imported where a page is written. Text stays text, colours are
those of the page's style sheet, and the same figure is the same SVG.
"""

import io
import re
import threading
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from sysdpo_jax.report.curves import Curve, Figure, Line, Values, as_floats

# In inches, of which the SVG makes 72 units: about as wide as a telephone, so that its text is legible there.
SIZE = (5.0, 2.9)
MAX_POINTS = 400
# The moving average spans about this share of a curve.
SMOOTHING = 0.05
# The length of an axis must be a number, too.
GREATEST = 1e300
# What is drawn in these colours has those of the style sheet's variables, which follow the light and the dark mode.
COLOURS = ("#2b62c4", "#c4501b", "#2e8540", "#8b3fb0", "#a67800", "#0f8a94", "#c22f68", "#5b6470")
FAINT, RULE = "#69707a", "#d9dde3"
# In matplotlib's files: what is replaced by what, in this order.
REWRITTEN = {
    "<(metadata|style).*?</\\1>": "",
    ' transform="[^"]*"': "",
    '<g id="curve': '<g class="curve',
    '<g id="[^"]*"': "<g",
    "xlink:href": "href",
    "'DejaVu Sans'[^;\"]*": "system-ui, sans-serif",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
LONG = re.compile(r"\d+\.\d{3,}")
TEXT: dict[Any, Any] = {
    "axes.labelcolor": FAINT,
    "font.size": 11,
    "svg.fonttype": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# matplotlib's settings belong to the process.
SETTINGS = threading.Lock()


def chart_svg(figure: Figure) -> Markup:
    """The drawing of a figure that changes. Its curves have the classes curve, raw, mean or band, and c0 to c7."""
    file = io.StringIO()
    with SETTINGS, mpl.rc_context(TEXT | {"svg.hashsalt": repr(figure)}):
        drawn = mpl.figure.Figure(SIZE, layout="constrained")
        axes = drawn.add_subplot()
        for box in (drawn.patch, axes.patch, axes.spines[:]):
            box.set_visible(False)
        axes.margins(x=0.02)
        axes.grid(axis="y", color=RULE, linewidth=1, clip_on=False)
        axes.tick_params(left=False, bottom=False)
        axes.set_xlabel("step")
        whole = all(float(step).is_integer() for curve in figure.curves for step in curve.steps)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        for number, curve in enumerate(figure.curves):
            _draw(axes, curve, number)
        for step in figure.marks:
            axes.axvline(step, color=FAINT, linewidth=0.6, gid="curve round")
        drawn.savefig(file, format="svg", metadata=METADATA)
    return _inline(file.getvalue(), f"{figure.title} over steps")


def colour_classes(number: int) -> str:
    """A colour for each of the first curves, then the same colours dashed."""
    return f"c{number % len(COLOURS)}" + (" dashed" if number >= len(COLOURS) else "")


def _draw(axes: Any, curve: Curve, number: int) -> None:
    """A curve on matplotlib's axes."""
    steps = as_floats(curve.steps)
    values, low, high = map(_drawable, (curve.values, *(curve.band or ((), ()))))
    colour, named = COLOURS[number % len(COLOURS)], colour_classes(number)
    dashed = number >= len(COLOURS)
    if curve.band is not None:
        seen = np.isfinite(low) & np.isfinite(high)
        look: dict[str, Any] = {"color": colour, "alpha": 0.18, "linewidth": 0, "clip_on": False}
        axes.fill_between(steps[seen], low[seen], high[seen], gid=f"curve band {named}", **look)
    # A long curve is drawn at some of its points; the average has seen all of them.
    rows = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    pale: dict[str, Any] = {"linewidth": 1, "alpha": 0.25}
    strong: dict[str, Any] = {"linewidth": 1.8, "linestyle": (0, (3, 2)) if dashed else "solid"}
    for kind, shown, look in (("raw", values, pale), ("mean", _smooth(values), strong)):
        look |= {"color": colour, "solid_capstyle": "round", "marker": "o", "markersize": 2.5, "clip_on": False}
        axes.plot(steps[rows], shown[rows], gid=f"curve {kind} {named}", markevery=_alone(shown[rows]), **look)


def _drawable(values: Values) -> Line:
    """NaN for what is not finite."""
    numbers = as_floats(values)
    return np.where(np.isfinite(numbers), numbers.clip(-GREATEST, GREATEST), np.nan)


def _smooth(values: Line) -> Line:
    """Centred moving average over the finite values; the gaps stay."""
    kernel = np.ones(2 * int(SMOOTHING * len(values) / 2) + 1)
    seen = np.isfinite(values)
    if not seen.any():
        return np.full(len(values), np.nan)
    total = np.convolve(np.where(seen, values, 0), kernel, "same")
    count = np.convolve(seen.astype(np.float64), kernel, "same")
    return np.where(seen, total / np.maximum(count, 1), np.nan)


def _alone(values: Line) -> list[int]:
    """Where a finite value has no neighbour, so that a line does not show it."""
    seen = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(seen[1:-1] & ~seen[:-2] & ~seen[2:]).tolist()


def _inline(svg: str, title: str) -> Markup:
    """matplotlib's file as a part of a page: without header, size and a style sheet of its own, and with a name."""
    head, _, body = svg[svg.index("<svg") :].partition(">")
    for pattern, text in REWRITTEN.items():
        body = re.sub(pattern, text, body, flags=re.DOTALL)
    # In tags alone: the numbers between them are the labels of the axes.
    body = re.sub("<[^>]*>", lambda tag: LONG.sub(lambda number: f"{float(number[0]):.2f}", tag[0]), body)
    box = re.findall('viewBox="[^"]*"', head)[0]
    return Markup(f'<svg {box} role="img"><title>{escape(title)}</title>{body}')
