"""The theory, verified exactly: minimising a population SysDPO loss gives beta-perfect alignment.

    python -m experiments.exact_alignment [--seed 1] [--beta 0.1] [--folder runs/exact_alignment]

A system is beta-perfectly aligned with a judge (arXiv 2502.17721; there with a uniform p_ref) when for all x, s, s'

    log [P(s > s' | x) / P(s' > s | x)] = beta log [p(s | x) p_ref(s' | x) / (p(s' | x) p_ref(s | x))].

The gap is the largest absolute difference of the two sides, in nats, with every p by enumeration in NumPy. Systems of
tables are small enough to train on all pairs of runs, weighted by the judge's probability: no sampling error is left,
and a gap is a property of the method. Expected, in three minutes on two cores:

    direct_gap    0 up to the solver: the odds come from a target system theta* of the same family,
                  R = beta log p*(s|x) / p_ref(s|x), so one loss on the whole system reaches them.
    outcome_gap   the same system measured on z, against the odds that the target's p*(z|x) stands for.
    sampling_gap  0 up to the solver, on z: SysDPO-Sampling on all pairs of outcomes with Y(x) = all intermediates.
                  p(z|x) is a mixture and the loss not convex: of several starts about the reference the one with the
                  lowest loss counts. sampling_gap_one_start is that of the reference itself.
    separate_gap  0.1 and more: each component on its own DPO loss sees the judge through the noise of all the others.
    z_judge_gap   a judge who sees z alone, with any R(x, z), under SysDPO-Direct. The log-ratio of s would have to
                  depend on z only, which the chain with one x can do and the other graphs in general cannot. What is
                  left there is a property of the graph: an independent solver on an independent loss is left with the
                  same. sampling_z_judge_gap: the same judge under SysDPO-Sampling, which asks for p(z|x) alone, so
                  that more graphs can follow.

A loop's turns are not searched for, and its components are not trained apart (nan: not asked).

Beside it a figure of what Sampling loses with fewer intermediates, by how they are found: `experiments.exact.study`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments.common.command import parse
from experiments.exact.populations import (
    local_populations,
    outcome_population,
    population_loss,
    sampling_loss,
    system_population,
)
from experiments.exact.solvers import independent_loss, independent_outcome_loss, lbfgs, lowest, nearby, newton
from experiments.exact.study import StudyConfig, draw_study, run_study
from experiments.exact.systems import SYSTEMS, ExactSystem, gap
from sysdpo_jax import DirectObjective, SamplingObjective
from sysdpo_jax.io import write_json
from sysdpo_jax.typing import Params

# The loss on outcomes is minimised from so many places near the first start, too.
NEARBY = 7
DISPLACEMENT = 0.1


@dataclass(frozen=True)
class Config:
    """beta: of judge and objectives; seed: of all that is random; steps: at most, of each solver; study: the figure."""

    beta: float = 0.5
    seed: int = 0
    steps: int = 2000
    study: StudyConfig = StudyConfig()
    folder: Path = Path("runs/exact_alignment")


def verify(exact: ExactSystem, config: Config) -> dict[str, float]:
    """The gaps of one system, in nats."""
    keys = jax.random.split(jax.random.key(config.seed), 3)
    reference, target = exact.system.init(keys[0]), exact.system.init(keys[1])
    base = exact.log_prob(reference)
    judge = config.beta * (exact.log_prob(target) - base)
    outcome_base = exact.outcome_log_prob(base)
    outcome_judge = config.beta * (exact.outcome_log_prob(exact.log_prob(target)) - outcome_base)
    z_judge = np.asarray(jax.random.normal(keys[2], outcome_base.shape))
    z_rewards = z_judge[:, exact.outcomes()]

    def on_outcomes(rewards: Float[np.ndarray, "x z"], params: Params) -> float:
        return gap(rewards, exact.outcome_log_prob(exact.log_prob(params)) - outcome_base, config.beta)

    direct, direct_on_z = align(exact, (judge, z_rewards), reference, config)
    # From another start too: with the library's they have neither loss nor solver nor path in common.
    direct_check = newton(independent_loss(exact, z_rewards, config.beta, reference), config.steps)(target)
    found = {
        "reference_gap": gap(judge, base - base, config.beta),
        "direct_gap": gap(judge, exact.log_prob(direct) - base, config.beta),
        "outcome_gap": on_outcomes(outcome_judge, direct),
        "z_judge_gap": on_outcomes(z_judge, direct_on_z),
        "z_judge_gap_independent": on_outcomes(z_judge, direct_check),
    }
    if not exact.system.bodies:
        separate = align_separately(exact, judge, reference, config)
        found["separate_gap"] = gap(judge, exact.log_prob(separate) - base, config.beta)
    if exact.system.bodies:
        # Turns are not searched for.
        return found
    (one_start, sampling), (_, sampling_on_z) = align_on_outcomes(exact, (outcome_judge, z_judge), reference, config)
    z_loss = independent_outcome_loss(exact, z_judge, config.beta, reference)
    sampling_check = lowest(newton(z_loss, config.steps), z_loss, nearby(target, NEARBY, DISPLACEMENT, keys[2]))
    return found | {
        "sampling_gap": on_outcomes(outcome_judge, sampling),
        "sampling_gap_one_start": on_outcomes(outcome_judge, one_start),
        "sampling_z_judge_gap": on_outcomes(z_judge, sampling_on_z),
        "sampling_z_judge_gap_independent": on_outcomes(z_judge, sampling_check),
    }


def align(
    exact: ExactSystem, judges: Sequence[Float[np.ndarray, "x s"]], reference: Params, config: Config
) -> list[Params]:
    """For each judge minimise the library's SysDPO-Direct loss on the population, from the reference."""
    populations = [system_population(exact, rewards) for rewards in judges]
    solve = lbfgs(population_loss(DirectObjective(config.beta), populations[0], reference), config.steps)
    return [solve(reference, population.share) for population in populations]


def align_on_outcomes(
    exact: ExactSystem, judges: Sequence[Float[np.ndarray, "x z"]], reference: Params, config: Config
) -> list[tuple[Params, Params]]:
    """For each judge minimise the library's SysDPO-Sampling loss on the population, with Y(x) = all intermediates.

    Returns where the solver comes to rest from the reference, and the lowest of that and of nearby starts.

    A step may drive a probability to nearly 0, where its logit has no gradient left although the loss would fall if it
    were larger. Not every path from about the reference meets such a plateau; the lowest loss is taken.
    """
    populations = [outcome_population(exact, rewards) for rewards in judges]
    loss = sampling_loss(SamplingObjective(config.beta), populations[0])
    solve = lbfgs(loss, config.steps)
    starts = nearby(reference, NEARBY, DISPLACEMENT, jax.random.key(config.seed))
    found = []
    for population in populations:
        data = reference, population.share, population.all_members()
        found.append((solve(reference, *data), lowest(solve, loss, starts, *data)))
    return found


def align_separately(exact: ExactSystem, judge: Float[np.ndarray, "x s"], reference: Params, config: Config) -> Params:
    """Each component on the DPO loss of its own nodes. Components share no parameter, so one sum is minimised."""
    populations = local_populations(exact, judge, exact.log_prob(reference))
    losses = []
    for population in populations:
        [key] = population.system.param_keys
        losses.append((key, population_loss(DirectObjective(config.beta), population, {key: reference[key]})))

    def total(params: Params, shares: Sequence[Array]) -> Array:
        each = (loss({key: params[key]}, share) for (key, loss), share in zip(losses, shares, strict=True))
        return sum(each, start=jax.numpy.zeros(()))

    return lbfgs(total, config.steps)(reference, [population.share for population in populations])


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One row a gap, one column a system."""
    width = max(map(len, results)) + 2
    lines = ["Largest residual of beta-perfect alignment, in nats"]
    lines.append(f"{'':<34}" + "".join(f"{system:>{width}}" for system in results))
    for name in next(iter(results.values())):
        values = (gaps.get(name, math.nan) for gaps in results.values())
        shown = (f"{value:>{width}.1e}" if value < 1e-3 else f"{value:>{width}.4f}" for value in values)
        lines.append(f"{name:<34}" + "".join(shown))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Write into the folder, and print the first of them:

    results.json, `{system: {gap: nats}}`; intermediates.json and intermediates.svg, the study's figures; config.json.
    """
    config = parse(Config(), arguments, __doc__)
    # In float64 the solvers can go to the end: what gap is left is the method's or the graph's, not rounding's.
    with jax.enable_x64(True):
        results = {exact.name: verify(exact, config) for exact in SYSTEMS}
        print(table(results))
        study = run_study(config.study, config.beta, config.seed)
    write_json(config.folder / "config.json", dataclasses.asdict(config) | {"folder": str(config.folder)})
    write_json(config.folder / "results.json", results)
    curves = {name: {m: point._asdict() for m, point in curve.items()} for name, curve in study.curves.items()}
    write_json(config.folder / "intermediates.json", {"before": study.before, "curves": curves})
    draw_study(study, config.folder / "intermediates.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
