"""The study's figure as an SVG file of its own: a curve a method over M on a logarithmic axis, with standard errors."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.exact.study import Study


def draw_study(study: Study, path: Path) -> None:
    """Gap on z against the number of intermediates; the dashed line is the gap before. The study alone decides."""
    numbers = sorted({number for curve in study.curves.values() for number in curve})
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = Figure((9.4, 4.6), layout="constrained")
        axes = figure.add_subplot(
            xscale="log", xticks=numbers, xlabel="number of intermediates M", ylabel="gap on z, nats"
        )
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="#d9dde3")
        for row, (name, curve) in enumerate(study.curves.items()):
            gaps, errors = zip(*((point.gap, point.standard_error) for point in curve.values()), strict=True)
            # Side by side, so that bars at the same M can be told apart.
            places = [number * 1.015 ** (row - len(study.curves) // 2) for number in curve]
            axes.errorbar(places, gaps, errors, label=name, capsize=3)
        axes.axhline(study.before, color="black", linestyle="--", label="before")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
        figure.savefig(path, metadata={"Date": None, "Title": "Gap on z over the number of intermediates M"})
