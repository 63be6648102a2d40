"""From figures of held-out runs to results.json. Errors are clustered by seed and request: runs of one are alike.

The training seeds count as fixed: the errors leave out what another seed would change, so figures by seed stand beside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.runs import Figures, as_numbers
from sysdpo_jax.evaluation import clustered_mean, paired_difference, win_rate

# What the main comparison must show: method, and the ones it is compared with.
COMPARISONS = (
    ("sysdpo", "before"),
    ("sysdpo", "lm_only"),
    ("sysdpo", "diffusion_only"),
    ("sysdpo", "separate_system"),
    ("sysdpo", "separate_local"),
    ("sysdpo_online", "best_of_n"),
    ("sysdpo_online", "sysdpo"),
)


def summarise(figures: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
    """figures: {seed: {method: columns}} -> methods (all seeds together and each alone), differences, win rates."""
    seeds, methods = sorted(figures), list(figures[min(figures)])
    pooled = {method: _pool([figures[seed][method] for seed in seeds]) for method in methods}
    return {
        "methods": {method: _row(columns) for method, columns in pooled.items()},
        "by_seed": {str(seed): {m: _row(_pool([figures[seed][m]])) for m in methods} for seed in seeds},
        "differences": {f"{a} - {b}": _difference(pooled[a], pooled[b]) for a, b in COMPARISONS},
    }


def _pool(parts: Sequence[Figures]) -> dict[str, np.ndarray]:
    names = ("score", "order", "well_formed", "surprise")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    columns["cluster"] = np.concatenate([[f"{i} {text}" for text in part["request"]] for i, part in enumerate(parts)])
    columns["fidelity"] = np.array([float(part["fidelity"]) for part in parts]).mean(keepdims=True)
    return columns


def _row(columns: Figures) -> dict[str, float | int | None]:
    score = clustered_mean(columns["score"], columns["cluster"])
    order = clustered_mean(columns["order"], columns["cluster"])
    return {
        "preference_score": score.value,
        "preference_score_se": score.standard_error,
        "order_consistency": order.value,
        "order_consistency_se": order.standard_error,
        "n": score.n,
        "well_formed": float(columns["well_formed"].mean()),
        "caption_entropy": float(columns["surprise"].mean()),
        "fidelity_error": float(columns["fidelity"][0]),
    }


def _difference(first: Figures, second: Figures) -> dict[str, dict[str, float | int | None]]:
    """Of paired runs: the same request, place and noise."""
    made = {
        "preference_score": paired_difference(first["score"], second["score"], first["cluster"]),
        "order_consistency": paired_difference(first["order"], second["order"], first["cluster"]),
        "win_rate": win_rate(first["score"], second["score"], first["cluster"]),
    }
    return {name: as_numbers(value) for name, value in made.items()}
