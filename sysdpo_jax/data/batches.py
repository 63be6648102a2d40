"""Batches as a pure function of the step: a run that resumes neither replays nor skips data."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Int, PyTree


def epoch_batches(data: PyTree, batch_size: int, seed: int) -> Callable[[int], PyTree]:
    """`batch_at(step)`: rows of `data` (arrays with one leading axis), shuffled anew every epoch by (seed, epoch).

    Rows that do not fill a last batch are left out of that epoch. Raises `ValueError` for fewer rows than a batch.
    """
    rows_at = epoch_rows(jax.tree.leaves(data)[0].shape[0], batch_size, seed)

    def batch_at(step: int) -> PyTree:
        chosen = rows_at(step)
        return jax.tree.map(lambda x: x[chosen], data)

    return batch_at


def epoch_rows(rows: int, batch_size: int, seed: int) -> Callable[[int], Int[np.ndarray, "batch"]]:
    """`rows_at(step)`: the numbers of the rows that `epoch_batches` takes."""
    if rows < batch_size:
        raise ValueError(f"{rows} rows do not fill one batch of {batch_size}: use a smaller batch or more data")
    per_epoch = rows // batch_size

    def rows_at(step: int) -> Int[np.ndarray, "batch"]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        return order[place * batch_size : (place + 1) * batch_size]

    return rows_at
