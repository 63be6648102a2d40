"""The study's figure as an SVG file of its own: a curve a method over M on a logarithmic axis, with standard errors."""

import math

from experiments.exact.study import Study
from sysdpo_jax.report.chart import ticks
from sysdpo_jax.report.markup import Markup, element

# In units of the viewBox; the legend is to the right of the axes.
WIDTH, HEIGHT = 680, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 16, 44
COLOURS = ("#2b62c4", "#c4501b", "#2e8540", "#8b3fb0", "#69707a")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1c1f24; }
.paper { fill: #ffffff; }
.grid { stroke: #d9dde3; }
.before { stroke: #1c1f24; stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""


def draw_study(study: Study) -> Markup:
    """Gap on z against the number of intermediates; the dashed line is the gap before."""
    points = [(number, point) for curve in study.curves.values() for number, point in curve.items()]
    numbers = sorted({number for number, _ in points})
    high = 1.05 * max(study.before, *(point.gap + point.standard_error for _, point in points))

    def across(number: int) -> float:
        span = math.log(numbers[-1] / numbers[0]) or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(number / numbers[0]) / span

    def down(gap: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * gap / high

    parts = [element("rect", width=WIDTH, height=HEIGHT, class_="paper")]
    for value in ticks(0.0, high):
        parts.append(_line(LEFT, down(value), WIDTH - RIGHT, down(value), class_="grid"))
        parts.append(_text(f"{value:g}", LEFT - 6, down(value) + 4, "end"))
    for number in numbers:
        parts.append(_text(str(number), across(number), HEIGHT - BOTTOM + 18, "middle"))
    parts.append(_text("number of intermediates M", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle"))
    place = f"rotate(-90) translate({-(TOP + HEIGHT - BOTTOM) / 2:g} 14)"
    parts.append(element("text", "gap on z, nats", transform=place, text_anchor="middle"))
    legend = WIDTH - RIGHT + 16
    for row, ((name, curve), colour) in enumerate(zip(study.curves.items(), COLOURS, strict=True)):
        places = [(across(number), point) for number, point in curve.items()]
        parts.append(
            element(
                "polyline",
                points=" ".join(f"{x:.1f},{down(p.gap):.1f}" for x, p in places),
                class_="curve",
                stroke=colour,
            )
        )
        for x, p in places:
            # Side by side, so that bars at the same M can be told apart.
            x = x + 3 * (row - len(COLOURS) // 2)
            low, top = down(max(0.0, p.gap - p.standard_error)), down(p.gap + p.standard_error)
            parts.append(_line(x, low, x, top, stroke=colour, class_="bar"))
        parts.append(
            _line(legend, TOP + 10 + 20 * row, legend + 24, TOP + 10 + 20 * row, stroke=colour, stroke_width=3)
        )
        parts.append(_text(name, legend + 32, TOP + 14 + 20 * row, "start"))
    last = TOP + 10 + 20 * len(study.curves)
    parts.append(_line(LEFT, down(study.before), WIDTH - RIGHT, down(study.before), class_="before"))
    parts.append(_line(legend, last, legend + 24, last, class_="before"))
    parts.append(_text("before", legend + 32, last + 4, "start"))
    title = element("title", "Gap on z over the number of intermediates M")
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"}
    return element("svg", title, element("style", Markup(STYLE)), *parts, **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, **attributes: str | int) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", **attributes)


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
