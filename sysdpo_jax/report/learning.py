"""Figures of what a run logged: docs/metrics.md has the names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sysdpo_jax.report.curves import Curve, Figure

# Rows as `training.read_metrics` returns them, each with "step".
Rows = Sequence[Mapping[str, Any]]

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


def run_figures(rows: Rows) -> tuple[Figure, ...]:
    """All there is to see of one run: loss, accuracy, margin, its evaluations, and the splits by node and component.

    Args:
        rows: Of its metrics.

    Returns:
        The figures.
    """
    titles = LEARNING | {metric: metric for metric in _evaluations(rows)}
    single = [Figure(title, (_curve(title, rows, metric),)) for metric, title in titles.items() if _has(rows, metric)]
    splits = [split_figure(title, rows, prefix) for prefix, title in SPLITS.items()]
    return (*single, *(figure for figure in splits if figure.curves))


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
