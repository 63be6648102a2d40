"""Which rows a batch has, and at which static sizes: a pure function of the step.

Rows of like sizes come together, and are padded to few static sizes: every shape of a batch is compiled once.
"""

from functools import lru_cache
from threading import Lock

import numpy as np
from jaxtyping import Int

# Sizes are multiples of this, which the devices' matrix units and attention kernels like.
MULTIPLE = 8
# Rows that sizes are chosen by, of a larger data set.
LOOKED_AT = 50_000


class Plan:
    """Which rows the batch of a step has, and their sizes: a function of the step and of what is given here alone.

    In each epoch the rows are shuffled by (seed, epoch), those of like sizes put together, and the batches shuffled.
    Rows that do not fill a last batch of their kind are left out of that epoch, others in the next one. Rows in which
    other nodes run are spread over the batches of a size, and over the parts of a batch: each has about as many runs of
    a node, so that few numbers of them are compiled and few places stay empty.

    Args:
        sizes: Of every row along every axis [rows, axes].
        kinds: Rows of one number can be in a batch [rows].
        batch_size: Rows of the global batch.
        shard: (index, count) gives the index-th of count equal blocks of each batch.
        shapes: How many static sizes there are at most, but one for every kind at least.
        runs: Of the nodes that do not run in every row, if there are some [rows, nodes].

    Raises:
        ValueError: Fewer rows than a batch, or a batch that count does not divide.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "rows axes"],
        kinds: Int[np.ndarray, "rows"],
        batch_size: int,
        seed: int,
        shard: tuple[int, int],
        shapes: int,
        runs: Int[np.ndarray, "rows nodes"] | None = None,
    ):
        if shapes < 1:
            raise ValueError(f"shapes {shapes} must be at least 1")
        block = batch_size // check_batches(len(kinds), batch_size, shard)
        self._seed, self._batch, self._block = seed, batch_size, slice(shard[0] * block, (shard[0] + 1) * block)
        every = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self._rows = [rows for rows in every if len(rows) >= batch_size]
        self.per_epoch = sum(len(rows) // batch_size for rows in self._rows)
        if not self.per_epoch:
            raise ValueError(f"no kind of rows fills one batch of {batch_size}: use a smaller batch or more data")
        self.left_out = len(kinds) - sum(map(len, self._rows))
        # Each kind's static sizes [shapes, axes], the smallest first.
        number = max(1, shapes // len(self._rows))
        self.shapes = [static_sizes(sizes[rows], number, batch_size) for rows in self._rows]
        # The smallest that each row fits in.
        self._fits = [_first_fit(sizes[rows], shapes) for rows, shapes in zip(self._rows, self.shapes, strict=True)]
        self._sizes = sizes
        # Rows of one number have the same runs; neighbours have much in common.
        ways = np.zeros(len(kinds)) if runs is None else np.unique(runs, axis=0, return_inverse=True)[1]
        self._ways = ways.reshape(-1)
        # Threads that read ahead ask for it together.
        self._epoch, self._lock = lru_cache(2)(self._shuffled), Lock()

    def at(self, step: int) -> tuple[Int[np.ndarray, "block"], tuple[int, ...]]:
        """The rows of this shard in the batch of a step, and the sizes of the whole batch."""
        rows, sizes = self.whole(step)
        return rows[self._block], sizes

    def whole(self, step: int) -> tuple[Int[np.ndarray, "batch"], tuple[int, ...]]:
        """The rows of all shards in the batch of a step, and its sizes."""
        epoch, place = divmod(step, self.per_epoch)
        with self._lock:
            return self._epoch(epoch)[place]

    def _shuffled(self, epoch: int) -> list[tuple[Int[np.ndarray, "batch"], tuple[int, ...]]]:
        random = np.random.default_rng((self._seed, epoch))
        batches: list[tuple[Int[np.ndarray, batch], tuple[int, ...]]] = []
        for rows, shapes, fits in zip(self._rows, self.shapes, self._fits, strict=True):
            order = random.permutation(len(rows))[: len(rows) // self._batch * self._batch]
            order = order[np.argsort(fits[order], kind="stable")]
            own = self._spread(rows[order].reshape(-1, self._batch), fits[order].reshape(-1, self._batch))
            # The largest of each axis: a batch whose rows lie between two shapes has the next one that fits all.
            fit = shapes[_first_fit(self._sizes[own].max(1), shapes)]
            batches += zip(own, map(tuple, fit.tolist()), strict=True)
        # Batches of one shape are in a random order already.
        several = sum(map(len, self.shapes)) > 1
        return [batches[place] for place in random.permutation(len(batches))] if several else batches

    def _spread(
        self, batches: Int[np.ndarray, "batches batch"], fits: Int[np.ndarray, "batches batch"]
    ) -> Int[np.ndarray, "batches batch"]:
        """The same rows in batches of the same sizes, those with the same runs dealt out to one after the other."""
        if not self._ways.any():
            return batches
        made = np.array(batches)
        for sizes in np.unique(fits[:, [0, -1]], axis=0):
            alike = (fits[:, [0, -1]] == sizes).all(1)
            rows = batches[alike].reshape(-1)
            made[alike] = rows[np.argsort(self._ways[rows], kind="stable")].reshape(self._batch, -1).T
        return made


def check_batches(rows: int, batch_size: int, shard: tuple[int, int]) -> int:
    """The number of shards. Raises `ValueError` where rows fill no batch or the batch is not cut as the shard says."""
    index, count = shard
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows is none: give at least 1")
    if rows < batch_size:
        raise ValueError(f"{rows} rows do not fill one batch of {batch_size}: use a smaller batch or more data")
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"shard {shard} is no part of a batch of {batch_size} rows: its index must be below its count, which must "
            "divide the batch (batch_shard gives both)"
        )
    return count


def check_parts(batch_size: int, accumulate: int) -> None:
    """Raise `ValueError` where a batch is not cut into so many parts."""
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"{batch_size} rows cannot be cut into {accumulate} equal parts: make the batch a multiple of them, or "
            "change accumulate"
        )


def static_sizes(sizes: Int[np.ndarray, "rows axes"], number: int, batch: int) -> Int[np.ndarray, "shapes axes"]:
    """At most `number` sizes that every row fits in one of, chosen so that little is padded; the smallest first.

    The rows are cut in two where that saves most, one group after the other. The largest size is always there: it takes
    the batches whose rows fit nowhere else together.
    """
    groups, whole = [sizes[:: -(-len(sizes) // LOOKED_AT)]], _rounded(sizes)
    found = whole[None]
    while True:
        cuts = [best_cut(group, batch) for group in groups]
        best = int(np.argmax([saved for saved, _, _ in cuts]))
        saved, axis, limit = cuts[best]
        if saved <= 0:
            break
        group = groups.pop(best)
        groups += [group[group[:, axis] <= limit], group[group[:, axis] > limit]]
        cut = np.unique([*(_rounded(group) for group in groups), whole], axis=0)
        if len(cut) > number:
            break
        found = cut
    # What was not looked at may fit in no group's size but the largest.
    return found[np.argsort(found.sum(1), kind="stable")]


def best_cut(sizes: Int[np.ndarray, "rows axes"], batch: int) -> tuple[int, int, int]:
    """(places saved, axis, largest size of the first part) of the best cut; at least a batch on either side."""
    best, rows = (0, 0, 0), len(sizes)
    whole = rows * int(_rounded(sizes).sum())
    for axis in range(sizes.shape[1]):
        ordered = sizes[np.argsort(sizes[:, axis], kind="stable")]
        below = _up(np.maximum.accumulate(ordered, axis=0)).sum(1)
        above = _up(np.maximum.accumulate(ordered[::-1], axis=0)[::-1]).sum(1)
        count = np.arange(1, rows)
        saved = whole - count * below[:-1] - (rows - count) * above[1:]
        # A cut lies between two different sizes.
        usable = (ordered[:-1, axis] < ordered[1:, axis]) & (count >= batch) & (rows - count >= batch)
        place = int(np.argmax(np.where(usable, saved, 0))) if rows > 1 else 0
        if rows > 1 and usable[place] and saved[place] > best[0]:
            best = int(saved[place]), axis, int(ordered[place, axis])
    return best


def _rounded(sizes: Int[np.ndarray, "rows axes"]) -> Int[np.ndarray, "axes"]:
    return _up(sizes.max(0))


def _up(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // MULTIPLE) * MULTIPLE


def _first_fit(sizes: Int[np.ndarray, "rows axes"], shapes: Int[np.ndarray, "shapes axes"]) -> Int[np.ndarray, "rows"]:
    """The first of the shapes that each row fits in."""
    fit = np.full(len(sizes), len(shapes) - 1)
    for place in reversed(range(len(shapes) - 1)):
        fit[(sizes <= shapes[place]).all(1)] = place
    return fit
