"""Preferences on outcomes alone: every ordered pair of z, and the library's SysDPO-Sampling loss on all of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.exact.systems import ExactSystem
from sysdpo_jax import CompoundSystem, PreferenceRecord, SampledBatch, SamplingObjective, sampled_batch
from sysdpo_jax.typing import Params
from sysdpo_jax.values import distinct

# (params, reference, share of each pair [pairs], which intermediates are in Y(x) [pairs, M]) -> loss.
SetLoss = Callable[[Params, Params, Array, Array], Array]


class OutcomePopulation(NamedTuple):
    """Ordered pairs of outcomes with all intermediates, so that a smaller Y(x) is a mask and not another shape.

    batch: [pairs, M, ...] with the M intermediates in the order of the runs. x: [pairs], the input of each pair.
    share: [pairs], how often the judge decides that way; they sum to 1.
    """

    system: CompoundSystem
    batch: SampledBatch
    x: np.ndarray
    share: Float[np.ndarray, " pairs"]

    def members(self, sets: Bool[np.ndarray, "x M"]) -> Bool[np.ndarray, "pairs M"]:
        """Y(x) of every pair, from that of every x."""
        return sets[self.x]

    def all_members(self) -> Bool[np.ndarray, "pairs M"]:
        """Y(x) = Y, with which p(z | x) is exact."""
        return np.asarray(self.batch.valid)


def outcome_population(exact: ExactSystem, rewards: Float[np.ndarray, "x z"]) -> OutcomePopulation:
    """All pairs of z on the same x, under a judge with rewards R(x, z) in nats (Bradley-Terry)."""
    inner, outer = ([n.name for n in nodes] for nodes in (exact.system.intermediates, exact.system.outputs))
    runs = exact.records()[: len(exact.runs())]
    every, finals = (distinct([{name: run[name] for name in names} for run in runs]) for names in (inner, outer))
    x, first, second = np.nonzero(np.broadcast_to(~np.eye(len(finals), dtype=bool), (len(rewards), *[len(finals)] * 2)))
    records = [
        PreferenceRecord({"x": int(row)}, finals[i], finals[j]) for row, i, j in zip(x, first, second, strict=True)
    ]
    wins = 1 / (1 + np.exp(rewards[x, second] - rewards[x, first]))
    batch = sampled_batch(exact.system, records, [every] * len(records), len(every))
    return OutcomePopulation(exact.system, batch, x, wins / wins.sum())


def sampling_loss(objective: SamplingObjective, population: OutcomePopulation) -> SetLoss:
    """The library's loss on the whole population; every pair is a batch of one, weighted by its share.

    Populations on the same system differ in what the loss takes, so they are one compilation.
    """
    system, key = population.system, jax.random.key(0)
    single = jax.tree.map(lambda x: jnp.asarray(x)[:, None], population.batch)

    def loss(params: Params, reference: Params, share: Array, members: Array) -> Array:
        def one(pair: SampledBatch) -> Array:
            return objective(system, params, reference, pair, key)[0]

        return jnp.sum(share * jax.vmap(one)(single._replace(valid=members[:, None])))

    return loss
