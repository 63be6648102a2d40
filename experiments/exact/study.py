"""How far SysDPO-Sampling comes with M intermediates: search and plain sampling on a chain that can be enumerated.

The chain is x -> y -> z with four x, y of three digits in base 3 and three z. Reference and target have random logits,
those of y doubled, so that few y carry most of p(y | x). In every round Y(x) is drawn from the current policy, then the
loss is minimised on it for some steps. The gap is that of p(z | x) summed over all 27 y.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure

from experiments.exact.populations import OutcomePopulation, outcome_population, sampling_loss
from experiments.exact.solvers import lbfgs
from experiments.exact.systems import chain, gap, log_tables
from sysdpo_jax import BeamSearch, SamplingObjective
from sysdpo_jax.decoding import Penalties, beam_search
from sysdpo_jax.typing import Params

BASE, DIGITS = 3, 3
VALUES = BASE**DIGITS


@dataclass(frozen=True)
class Searched:
    """The `number` beams of a (diverse) beam search, like a language model's over tokens."""

    search: BeamSearch

    def draw(self, params: Params, number: int, key: PRNGKeyArray) -> Bool[np.ndarray, "x values"]:
        """Which y are in Y(x); the key is not used."""
        tables = jnp.asarray(prefix_tables(log_tables(params)["y"]), jnp.float32)
        values, valid = _search(tables, self.search.penalties(), number, self.search.groups(number))
        sets = np.zeros((len(tables), VALUES), bool)
        rows, places = np.nonzero(valid)
        sets[rows, np.asarray(values)[rows, places]] = True
        return sets


@dataclass(frozen=True)
class Sampled:
    """`number` independent samples of p(y | x), of which equal ones are one member of Y(x)."""

    def draw(self, params: Params, number: int, key: PRNGKeyArray) -> Bool[np.ndarray, "x values"]:
        """Which y are in Y(x)."""
        logits = params["y"]["logits"]
        # Always as many, so that a larger Y(x) holds the smaller one's samples.
        values = np.asarray(jax.random.categorical(key, logits, shape=(VALUES, len(logits))))[:number]
        sets = np.zeros((len(logits), VALUES), bool)
        sets[np.arange(len(logits)), values] = True
        return sets


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


def draw_study(study: Study, path: Path) -> None:
    """Gap on z against the number of intermediates; the dashed line is the gap before. The study alone decides."""
    numbers = sorted({number for curve in study.curves.values() for number in curve})
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = Figure((9.4, 4.6), layout="constrained")
        axes = figure.add_subplot(
            xscale="log", xticks=numbers, xlabel="number of intermediates M", ylabel="gap on z, nats"
        )
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="#d9dde3")
        for row, (name, curve) in enumerate(study.curves.items()):
            gaps, errors = zip(*((point.gap, point.standard_error) for point in curve.values()), strict=True)
            # Side by side, so that bars at the same M can be told apart.
            places = [number * 1.015 ** (row - len(study.curves) // 2) for number in curve]
            axes.errorbar(places, gaps, errors, label=name, capsize=3)
        axes.axhline(study.before, color="black", linestyle="--", label="before")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
        figure.savefig(path, metadata={"Date": None, "Title": "Gap on z over the number of intermediates M"})


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


def prefix_tables(log_prob: Float[np.ndarray, "x values"]) -> Float[np.ndarray, "x prefixes base"]:
    """log p(next digit, prefix | x) for every prefix of less than three digits; normalised it is the conditional.

    The prefixes are ordered by length, then by their number in base 3, first digit first: 0 is the empty one and n has
    the continuations 3 n + 1, 3 n + 2 and 3 n + 3.
    """
    levels = [
        np.logaddexp.reduce(log_prob.reshape(len(log_prob), BASE**length, BASE, -1), axis=-1)
        for length in range(DIGITS)
    ]
    return np.concatenate(levels, axis=1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search(
    tables: Float[Array, "x prefixes base"], penalties: Penalties, num_beams: int, num_groups: int
) -> tuple[Int[Array, "x beams"], Bool[Array, "x beams"]]:
    """The values that the beams spell, and which beams are valid."""

    def step(tokens: Array, parents: Array | None, prefix: Array, made: Array) -> Any:
        kept = prefix if parents is None else jnp.take_along_axis(prefix, parents, axis=1)
        prefix = kept * BASE + tokens + 1
        return jnp.take_along_axis(tables, prefix[..., None], axis=1), prefix

    beams = beam_search(
        step,
        tables[:, 0],
        jnp.zeros((len(tables), num_beams), jnp.int32),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=DIGITS,
        stop_tokens=(),
        pad_token=0,
    )
    powers = jnp.array([BASE**place for place in reversed(range(DIGITS))], jnp.int32)
    return jnp.sum(beams.tokens * powers, axis=-1), beams.valid
