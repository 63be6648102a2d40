"""Runs of a system inside a phase: progress, the best of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax import CompoundSystem, rollout
from sysdpo_jax.evaluation import Estimate
from sysdpo_jax.training import Report
from sysdpo_jax.typing import Params, Record

Figures = Mapping[str, np.ndarray]


def reported_rollout(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    key: PRNGKeyArray,
    samples: int,
    batch_size: int,
    report: Report,
) -> list[dict[str, Any]]:
    """`rollout`, with the number of runs made so far on a phase's bar."""
    done = 0

    def count(made: int) -> None:
        nonlocal done
        done += made
        report(done, "")

    return rollout(system, params, inputs, key, samples, batch_size, count)


def best_of(runs: Sequence[Figures]) -> dict[str, np.ndarray]:
    """For every row the one of the runs with the highest "score"; columns that are one number are left out."""
    best = np.argmax([run["score"] for run in runs], axis=0)
    rows = np.arange(len(best))
    return {name: np.stack([run[name] for run in runs])[best, rows] for name in runs[0] if runs[0][name].ndim}


def as_numbers(estimate: Estimate) -> dict[str, float | int | None]:
    """An estimate as results.json holds it."""
    return {"value": estimate.value, "standard_error": estimate.standard_error, "n": estimate.n}
