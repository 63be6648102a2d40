"""Runs of a system on a list of inputs, and preference pairs from scored runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.typing import Params, Record


def rollout(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    key: PRNGKeyArray,
    samples: int = 1,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """`samples` whole-system runs of every input; runs of one input are adjacent.

    Batches all have the same size (the last is filled up and cut), so nothing recompiles. `progress` is told how many
    runs each batch made.
    """
    rows = [record for record in inputs for _ in range(samples)]
    records: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(rows), batch_size)):
        batch = rows[start : start + batch_size]
        filled = batch + [batch[-1]] * (batch_size - len(batch))
        records += system.sample(params, filled, jax.random.fold_in(key, number))[: len(batch)]
        progress(len(batch))
    return records


def make_pairs(
    system: CompoundSystem,
    records: Sequence[Mapping[str, Any]],
    scores: Float[np.ndarray, "runs"],
    group: int,
    min_margin: float = 0.0,
) -> list[PreferenceRecord]:
    """The best against the worst of each group of adjacent runs of one input, when their scores differ by more.

    records, scores: as `rollout` returns them and a judge of theirs, higher is better. group: runs in a group; it must
    divide the runs of one input. min_margin: smallest difference kept; ties are always dropped.
    Raises `ValueError` for scores that are not finite or groups that mix inputs.
    """
    if len(records) != len(scores) or len(records) % group:
        raise ValueError(f"{len(records)} runs and {len(scores)} scores do not form groups of {group}")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of run {int(np.argmin(np.isfinite(scores)))} is not finite: fix or drop the run")
    pairs = []
    for start in range(0, len(records), group):
        inputs = {name: records[start][name] for name in system.inputs}
        for row in range(start, start + group):
            if any(records[row][name] != inputs[name] for name in system.inputs):
                raise ValueError(f"runs {start} and {row} of one group have different inputs: check `group`")
        best, worst = (start + int(pick(scores[start : start + group])) for pick in (np.argmax, np.argmin))
        margin = scores[best] - scores[worst]
        if margin > 0 and margin >= min_margin:
            sides = ({node.name: records[row][node.name] for node in system.nodes} for row in (best, worst))
            pairs.append(PreferenceRecord(inputs, *sides))
    return pairs
