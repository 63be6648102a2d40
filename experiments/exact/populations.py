"""Populations of preference pairs: every ordered pair of runs or outcomes, weighted by how often a judge decides so.

A judge is a table of rewards R(x, s) in nats: it prefers s to s' with probability sigmoid(R(x, s) - R(x, s')), the
Bradley-Terry model. Its odds are what a perfectly aligned system reproduces.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import sysdpo_jax as sj
from experiments.exact.systems import ExactSystem
from sysdpo_jax.typing import Params
from sysdpo_jax.values import distinct

# (params, reference, share of each pair [pairs], which intermediates are in Y(x) [pairs, M]) -> loss.
SetLoss = Callable[[Params, Params, Array, Array], Array]


class Population(NamedTuple):
    """Ordered pairs: row numbers of the preferred and the other record, and the share of each pair (they sum to 1)."""

    system: sj.CompoundSystem
    records: Sequence[dict[str, Any]]
    chosen: np.ndarray
    rejected: np.ndarray
    share: np.ndarray


def population_loss(
    objective: sj.DirectObjective, population: Population, reference: Params
) -> Callable[[Params, Array], Array]:
    """(params, share) -> the library's loss on the whole population.

    Every pair is a batch of one, so that it can be weighted by its share; populations on the same runs differ in that.
    """
    system, key = population.system, jax.random.key(0)
    features = system.prepare(population.records)
    rows = population.chosen[:, None], population.rejected[:, None]
    pairs = sj.PairBatch(*(jax.tree.map(lambda x, r=r: jnp.asarray(x)[r], features) for r in rows))

    def loss(params: Params, share: Array) -> Array:
        losses = jax.vmap(lambda pair: objective(system, params, reference, pair, key)[0])(pairs)
        return jnp.sum(share * losses)

    return loss


def system_population(exact: ExactSystem, rewards: Float[np.ndarray, "x s"]) -> Population:
    """All pairs of runs on the same x: the data of SysDPO-Direct when they cover every intermediate value."""
    inputs, runs = rewards.shape
    x, first, second = (index.ravel() for index in np.meshgrid(*map(np.arange, (inputs, runs, runs)), indexing="ij"))
    wins = _sigmoid(rewards[x, first] - rewards[x, second])
    return _population(exact.system, exact.records(), x * runs + first, x * runs + second, wins)


def local_populations(
    exact: ExactSystem, rewards: Float[np.ndarray, "x s"], reference: Float[np.ndarray, "x s"]
) -> list[Population]:
    """What each component would be aligned on alone, one population for each value v_k of s (a plate's copies too).

    A local pair is two values v_k, v_k' of a node after the same values of its parents. Nobody sees more than the
    whole runs, so its label is the judge's on two whole runs whose other values are drawn from the reference system,
    given x, the parents and v_k or v_k'; x is uniform a priori and the same in both runs:

        P(v_k > v_k' | Pa) = E_{x | Pa} E_{s | x, Pa, v_k} E_{s' | x, Pa, v_k'} P(s > s' | x).
    """
    return [_local(exact, axis, rewards, np.exp(reference)) for axis in range(len(exact.values))]


class OutcomePopulation(NamedTuple):
    """Ordered pairs of outcomes with all intermediates, so that a smaller Y(x) is a mask and not another shape.

    batch: [pairs, M, ...] with the M intermediates in the order of the runs. x: [pairs], the input of each pair.
    share: [pairs], how often the judge decides that way; they sum to 1.
    """

    system: sj.CompoundSystem
    batch: sj.SampledBatch
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
    every = distinct([{name: run[name] for name in inner if name in run} for run in runs])
    # By the number of the outcome: which branch of a switch made it is summed over.
    ends = {
        int(z): {name: run[name] for name in outer if name in run}
        for z, run in zip(exact.outcomes(), runs, strict=True)
    }
    finals = [ends[z] for z in sorted(ends)]
    x, first, second = np.nonzero(np.broadcast_to(~np.eye(len(finals), dtype=bool), (len(rewards), *[len(finals)] * 2)))
    records = [
        sj.PreferenceRecord({"x": int(row)}, finals[i], finals[j]) for row, i, j in zip(x, first, second, strict=True)
    ]
    wins = _sigmoid(rewards[x, first] - rewards[x, second])
    batch = sj.sampled_batch(exact.system, records, [every] * len(records), len(every))
    return OutcomePopulation(exact.system, batch, x, wins / wins.sum())


def sampling_loss(objective: sj.SamplingObjective, population: OutcomePopulation) -> SetLoss:
    """The library's loss on the whole population; every pair is a batch of one, weighted by its share.

    Populations on the same system differ in what the loss takes, so they are one compilation.
    """
    system, key = population.system, jax.random.key(0)
    single = jax.tree.map(lambda x: jnp.asarray(x)[:, None], population.batch)

    def loss(params: Params, reference: Params, share: Array, members: Array) -> Array:
        def one(pair: sj.SampledBatch) -> Array:
            return objective(system, params, reference, pair, key)[0]

        return jnp.sum(share * jax.vmap(one)(single._replace(valid=members[:, None])))

    return loss


def _local(exact: ExactSystem, axis: int, rewards: np.ndarray, probability: np.ndarray) -> Population:
    node, values = exact.system.node(exact.values[axis]), np.array(exact.runs())[:, axis]
    prefers = _sigmoid(rewards[:, :, None] - rewards[:, None, :])
    records: list[dict[str, Any]] = []
    pairs: list[tuple[int, int, float]] = []
    for parents, seen in _contexts(exact, node):
        # Where the node ran.
        reached = seen & (values >= 0)
        weight = (probability * reached).sum(1)  # p(x | Pa), up to its sum
        drawn = np.stack([probability * reached * (values == v) for v in range(values.max() + 1)])
        drawn /= np.maximum(drawn.sum(-1, keepdims=True), np.finfo(float).tiny)  # p(s | x, Pa, v)
        wins = np.einsum("x,vxs,xst,wxt->vw", weight / weight.sum(), drawn, prefers, drawn)
        start = len(records)
        records += [{**parents, node.name: v} for v in range(len(drawn))]
        pairs += [(start + v, start + w, wins[v, w]) for v, w in np.ndindex(*wins.shape)]
    alone = sj.CompoundSystem(node.parents, (sj.Node(node.name, node.component, node.parents, node.params),))
    chosen, rejected, shares = map(np.array, zip(*pairs, strict=True))
    return _population(alone, records, chosen, rejected, shares)


def _contexts(exact: ExactSystem, node: sj.Node) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Every assignment of the node's parents, and the runs [X, S] in which they take these values."""
    runs = np.array(exact.runs())
    columns = {name: runs[None, :, axis] for axis, name in enumerate(exact.values)}
    columns["x"] = np.arange(exact.num_inputs)[:, None]
    for choice in itertools.product(*(range(columns[parent].max() + 1) for parent in node.parents)):
        parents = dict(zip(node.parents, choice, strict=True))
        reached = np.all(
            [np.broadcast_to(columns[k] == v, (exact.num_inputs, len(runs))) for k, v in parents.items()], 0
        )
        yield parents, reached


def _population(
    system: sj.CompoundSystem,
    records: Sequence[dict[str, Any]],
    chosen: np.ndarray,
    rejected: np.ndarray,
    wins: np.ndarray,
) -> Population:
    """Without the pairs of a record with itself, which no parameter moves."""
    kept = chosen != rejected
    return Population(system, records, chosen[kept], rejected[kept], wins[kept] / wins[kept].sum())


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))
