"""How far SysDPO-Sampling comes with M intermediates: search and plain sampling on a chain that can be enumerated.

The chain is x -> y -> z with four x, y of three digits in base 3 and three z. Reference and target have random logits,
those of y doubled, so that few y carry most of p(y | x). In every round Y(x) is drawn from the current policy, then the
loss is minimised on it for some steps. The gap is that of p(z | x) summed over all 27 y.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from experiments.exact.digits import VALUES, Sampled, Searched
from experiments.exact.outcomes import OutcomePopulation, outcome_population, sampling_loss
from experiments.exact.solvers import lbfgs
from experiments.exact.systems import chain, gap, log_tables
from sysdpo_jax import BeamSearch, SamplingObjective
from sysdpo_jax.typing import Params

DIGIT_CHAIN = chain("digits", num_inputs=4, intermediates=VALUES)
METHODS: Mapping[str, Searched | Sampled] = {
    "beam search": Searched(BeamSearch(num_beam_groups=1)),
    **{f"diverse, strength {s:g}": Searched(BeamSearch(diversity_penalty=s)) for s in (0.2, 1.0, 5.0)},
    "plain sampling": Sampled(),
}


@dataclass(frozen=True)
class StudyConfig:
    """systems: random chains that a point is averaged over; numbers: M; steps: of L-BFGS on each round's Y(x)."""

    systems: int = 6
    numbers: tuple[int, ...] = (1, 2, 4, 8, 16, 27)
    rounds: int = 20
    steps: int = 25


class Point(NamedTuple):
    """One method with one M: means over the systems after the last round.

    gap: on z, in nats, and its standard error. distinct: the size of the last Y(x). mass: what it has of p(y | x) under
    the policy that it was drawn from.
    """

    gap: float
    standard_error: float
    distinct: float
    mass: float


class Study(NamedTuple):
    """The mean gap of the reference, and {method: {M: point}}."""

    before: float
    curves: Mapping[str, Mapping[int, Point]]


class Case(NamedTuple):
    """One random chain under its target's judge."""

    reference: Params
    rewards: Float[np.ndarray, "x z"]
    population: OutcomePopulation
    key: PRNGKeyArray


def run_study(config: StudyConfig, beta: float, seed: int) -> Study:
    """The same random chains and keys for every method and M. Raises ValueError for fewer than two systems."""
    if config.systems < 2:
        raise ValueError(f"a standard error needs two systems or more, not {config.systems}")
    cases = [_case(jax.random.fold_in(jax.random.key(seed), number), beta) for number in range(config.systems)]
    # The number of pairs is the same in all, so one compilation serves every case, method and M.
    solve = lbfgs(sampling_loss(SamplingObjective(beta), cases[0].population), config.steps)

    def point(method: Searched | Sampled, number: int) -> Point:
        found = np.array([_align(method, number, case, solve, config.rounds, beta) for case in cases])
        gap, distinct, mass = map(float, found.mean(0))
        return Point(gap, float(found[:, 0].std(ddof=1) / np.sqrt(len(found))), distinct, mass)

    curves = {name: {number: point(method, number) for number in config.numbers} for name, method in METHODS.items()}
    return Study(float(np.mean([_gap(case, case.reference, beta) for case in cases])), curves)


def _case(key: PRNGKeyArray, beta: float) -> Case:
    reference, target = (_chain_params(k) for k in jax.random.split(key))
    base, aim = (DIGIT_CHAIN.outcome_log_prob(DIGIT_CHAIN.log_prob(params)) for params in (reference, target))
    rewards = beta * (aim - base)
    return Case(reference, rewards, outcome_population(DIGIT_CHAIN, rewards), key)


def _chain_params(key: PRNGKeyArray) -> Params:
    params = DIGIT_CHAIN.system.init(key)
    return {**params, "y": {"logits": 2 * params["y"]["logits"]}}


def _align(
    method: Searched | Sampled, number: int, case: Case, solve: Callable[..., Params], rounds: int, beta: float
) -> tuple[float, float, float]:
    """Gap, size of the last Y(x), its mass under the policy that it was drawn from."""
    params, population = case.reference, case.population
    for turn in range(rounds):
        sets = method.draw(params, number, jax.random.fold_in(case.key, turn))
        mass = (np.exp(log_tables(params)["y"]) * sets).sum(1).mean()
        params = solve(params, case.reference, population.share, population.members(sets))
    return _gap(case, params, beta), sets.sum(1).mean(), mass


def _gap(case: Case, params: Params, beta: float) -> float:
    base, found = (DIGIT_CHAIN.outcome_log_prob(DIGIT_CHAIN.log_prob(p)) for p in (case.reference, params))
    return gap(case.rewards, found - base, beta)
