"""What both pages of figures compare: a system before and after its alignment, on the same questions."""

from dataclasses import asdict
from typing import Any

from sysdpo_jax.evaluation import clustered_mean, paired_difference


def compared(before: Any, after: Any, clusters: Any) -> dict[str, Any]:
    """Both means and their paired difference, with standard errors clustered as given. All: a value a run."""
    estimates = {
        "before": clustered_mean(before, clusters),
        "after": clustered_mean(after, clusters),
        "difference": paired_difference(after, before, clusters),
    }
    return {side: asdict(estimate) for side, estimate in estimates.items()}
