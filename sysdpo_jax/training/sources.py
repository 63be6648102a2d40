"""Batches as the step takes them: what a source leaves raw, the frozen parts encode."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from jaxtyping import PyTree

from sysdpo_jax.batch import encode_batch
from sysdpo_jax.data.batches import EpochBatches
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.parallel.replicate import replicate_per_process
from sysdpo_jax.typing import Params


def encoder(system: CompoundSystem, params: Params) -> Callable[[PyTree], PyTree]:
    """`encode_batch` by the frozen entries of `params`, on this process's own devices; all processes must call this."""
    return partial(encode_batch, system, replicate_per_process(system.frozen_params(params)))


def encoded(batch_at: Callable[[int], PyTree], encode: Callable[[PyTree], PyTree]) -> Callable[[int], PyTree]:
    """The same batches, encoded: data that are held whole (`epoch_batches`) once, before the first; others one by one.

    encode: gives back what is encoded already.
    """
    if not isinstance(batch_at, EpochBatches):
        return lambda step: encode(batch_at(step))
    whole = cache(lambda: replace(batch_at, data=encode(batch_at.data)))
    return lambda step: whole()(step)
