"""Batches as a pure function of the step: a run that resumes neither replays nor skips data."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int, PyTree


@dataclass(frozen=True)
class EpochBatches:
    """`batch_at(step)`, made by `epoch_batches`. data: all rows; rows_at: the numbers of those of a step."""

    data: PyTree
    rows_at: Callable[[int], Int[np.ndarray, "batch"]]

    def __call__(self, step: int) -> PyTree:
        chosen = self.rows_at(step)
        return jax.tree.map(lambda x: x[chosen], self.data)


def epoch_batches(data: PyTree, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)) -> EpochBatches:
    """`batch_at(step)`: rows of `data` (arrays with one leading axis), shuffled anew every epoch by (seed, epoch).

    Rows that do not fill a last batch are left out of that epoch. shard: (index, count) gives the index-th of count
    equal blocks of each batch, as `batch_shard(mesh)` says for this process; `data` are all rows nevertheless.
    `Trainer.fit` encodes what of the data is raw once, before its first step.
    Raises `ValueError` for fewer rows than a batch or a batch that count does not divide.
    """
    return EpochBatches(data, epoch_rows(jax.tree.leaves(data)[0].shape[0], batch_size, seed, shard))


def epoch_rows(
    rows: int, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> Callable[[int], Int[np.ndarray, "batch"]]:
    """`rows_at(step)`: the numbers of the rows that `epoch_batches` takes."""
    index, count = check_batches(rows, batch_size, shard)
    per_epoch, block = rows // batch_size, batch_size // count

    def rows_at(step: int) -> Int[np.ndarray, "batch"]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        first = place * batch_size + index * block
        return order[first : first + block]

    return rows_at


def check_batches(rows: int, batch_size: int, shard: tuple[int, int]) -> tuple[int, int]:
    """The shard. Raises `ValueError` where the rows do not fill a batch or the batch is not cut as the shard says."""
    index, count = shard
    if rows < batch_size:
        raise ValueError(f"{rows} rows do not fill one batch of {batch_size}: use a smaller batch or more data")
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"shard {shard} is no part of a batch of {batch_size} rows: its index must be below its count, which must "
            "divide the batch (batch_shard gives both)"
        )
    return index, count
