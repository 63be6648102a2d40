"""From figures of held-out runs to results.json. Errors are clustered by seed and question: runs of one are alike.

The training seeds count as fixed: the errors leave out what another seed would change, so figures by seed stand beside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.runs import Figures, as_numbers
from sysdpo_jax.evaluation import clustered_mean, paired_difference

# What the main comparison must show: method, and the ones it is compared with.
COMPARISONS = (
    ("sysdpo_sampling", "prompted"),
    ("sysdpo_sampling", "first_only"),
    ("sysdpo_sampling", "second_only"),
    ("sysdpo_sampling", "separate"),
    ("sysdpo_sampling", "separate_sampling"),
    ("sysdpo_sampling", "sysdpo_direct"),
    ("sysdpo_sampling", "best_of_n"),
    ("sysdpo_direct", "separate"),
)


def summarise(figures: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
    """figures: {seed: {method: columns}} -> methods (all seeds together and each alone) and paired differences."""
    seeds, methods = sorted(figures), list(figures[min(figures)])
    pooled = {method: _pool([figures[seed][method] for seed in seeds]) for method in methods}
    return {
        "methods": {method: _row(columns) for method, columns in pooled.items()},
        "by_seed": {str(seed): {m: _row(_pool([figures[seed][m]])) for m in methods} for seed in seeds},
        "differences": {
            f"{a} - {b}": _difference(pooled[a], pooled[b]) for a, b in COMPARISONS if {a, b} <= set(methods)
        },
    }


def _pool(parts: Sequence[Figures]) -> dict[str, np.ndarray]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("right", "score")}
    clusters = [[f"{i} {question}" for question in part["question"]] for i, part in enumerate(parts)]
    return columns | {"cluster": np.concatenate(clusters)}


def _row(columns: Figures) -> dict[str, float | int | None]:
    right = clustered_mean(columns["right"], columns["cluster"])
    score = clustered_mean(columns["score"], columns["cluster"])
    return {
        "accuracy": right.value,
        "accuracy_se": right.standard_error,
        "score": score.value,
        "score_se": score.standard_error,
        "n": right.n,
        "questions": len(set(columns["cluster"])),
    }


def _difference(first: Figures, second: Figures) -> dict[str, dict[str, float | int | None]]:
    """Of paired runs: the same question, place and noise."""
    return {
        name: as_numbers(paired_difference(first[column], second[column], first["cluster"]))
        for name, column in (("accuracy", "right"), ("score", "score"))
    }
