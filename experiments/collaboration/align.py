"""Alignment of the system, or of one of its models, from preferences with recorded drafts or on final answers alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from experiments.collaboration.task import ANSWER, DRAFT, REFINER, AlignConfig
from experiments.common import models
from sysdpo_jax.training import ProgressFactory, SystemOptimizer
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Alignment:
    """nodes: those that are trained. recorded: whether pairs hold the drafts (SysDPO-Direct), else SysDPO-Sampling."""

    nodes: tuple[str, ...]
    recorded: bool


BOTH = (DRAFT, ANSWER)
ALIGNMENTS = {
    "draft_recorded": Alignment((DRAFT,), True),
    "answer_recorded": Alignment((ANSWER,), True),
    "first_only": Alignment((DRAFT,), False),
    "second_only": Alignment((ANSWER,), False),
    "sysdpo_sampling": Alignment(BOTH, False),
    "sysdpo_direct": Alignment(BOTH, True),
}


def optimizer_of(system: sj.CompoundSystem, nodes: Sequence[str], config: AlignConfig, steps: int) -> SystemOptimizer:
    """Adam with warm-up and a cosine for the parameters of the nodes; the other parameters are frozen."""
    rates = {key: config.refiner_rate if key == REFINER else config.drafter_rate for key in system.param_keys}
    trained = {system.node(name).params_key for name in nodes}
    return sj.make_optimizer(
        {
            key: models.adam_with_warmup(rates[key], config.trainable, steps) if key in trained else sj.FROZEN
            for key in system.param_keys
        }
    )


def number_of_steps(pairs: Sequence[sj.PreferenceRecord], config: AlignConfig) -> int:
    """At most `epochs` passes over the pairs."""
    return min(config.steps, config.epochs * (len(pairs) // config.batch_size))


def align(
    system: sj.CompoundSystem,
    params: Params,
    pairs: Sequence[sj.PreferenceRecord],
    alignment: Alignment,
    config: AlignConfig,
    directory: Path,
    key: PRNGKeyArray,
    progress: ProgressFactory,
) -> Params:
    """Parameters of the system after the alignment, with `params` as reference."""
    steps, size = number_of_steps(pairs, config), config.batch_size
    optimizer = optimizer_of(system, alignment.nodes, config, steps)
    sft = tuple((name, config.sft) for name in alignment.nodes)
    objective: sj.DirectObjective | sj.SamplingObjective
    batches: Callable[[int], Any]
    if alignment.recorded:
        objective = sj.DirectObjective(config.beta, sft=sft)
        batches = partial(sj.epoch_batches, sj.prepare_pairs(system, pairs), size)
    else:
        objective = sj.SamplingObjective(config.beta, sft=sft, chunk_size=config.chunk_size)
        texts = sj.without_intermediates(system, pairs)
        number, every = config.num_intermediates, config.every
        batches = lambda seed: sj.SearchedBatches(system, texts, size, seed, number, every)  # noqa: E731
    trainer = sj.Trainer(system, objective, optimizer, directory, keep=1, progress=progress)
    return models.align(trainer, params, batches, steps, key)
