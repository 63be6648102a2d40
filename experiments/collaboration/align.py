"""Alignments of the system, or of one of its models: what is trained, how, and whether pairs hold the drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import sysdpo_jax as sj
from experiments.collaboration.task import ANSWER, DRAFT, REFINER, AlignConfig
from experiments.common import models
from sysdpo_jax.training import SystemOptimizer


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
