"""The theory, verified exactly: minimising the population SysDPO-Direct loss gives beta-perfect alignment.

    python -m experiments.exact_alignment [--seed 1] [--beta 0.1] [--folder runs/exact_alignment]

A system is beta-perfectly aligned with a judge (arXiv 2502.17721; there with a uniform p_ref) when for all x, s, s'

    log [P(s > s' | x) / P(s' > s | x)] = beta log [p(s | x) p_ref(s' | x) / (p(s' | x) p_ref(s | x))].

The gap is the largest absolute difference of the two sides, in nats, with every p by enumeration in NumPy. Systems of
tables are small enough to train on all pairs of runs, weighted by the judge's probability: no sampling error is left,
and a gap is a property of the method. Expected, in under a minute on two cores:

    direct_gap    0 up to the solver: the odds come from a target system theta* of the same family,
                  R = beta log p*(s|x) / p_ref(s|x), so one loss on the whole system reaches them.
    outcome_gap   the same system measured on z, against the odds that the target's p*(z|x) stands for.
    separate_gap  0.1 and more: each component on its own DPO loss sees the judge through the noise of all the others.
    z_judge_gap   a judge who sees z alone, with any R(x, z). The log-ratio of s would have to depend on z only, which
                  the chain with one x can do and the other graphs in general cannot. What is left there is a property
                  of the graph: an independent solver on an independent loss is left with the same.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from jaxtyping import Array, Float

from experiments.exact.preferences import local_populations, population_loss, system_population
from experiments.exact.solvers import independent_loss, lbfgs, newton
from experiments.exact.systems import SYSTEMS, ExactSystem
from sysdpo_jax import DirectObjective
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Config:
    """beta: of the judge and the objective; seed: of reference, target and judge; steps: at most, of each solver."""

    beta: float = 0.5
    seed: int = 0
    steps: int = 2000
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

    direct, on_z = (exact.log_prob(params) for params in align(exact, (judge, z_rewards), reference, config))
    separate = exact.log_prob(align_separately(exact, judge, reference, config))
    # From another start too: with the library's it has neither loss nor solver nor path in common.
    solved = newton(independent_loss(exact, z_rewards, config.beta, reference), target, config.steps)
    found = {
        "reference_gap": gap(judge, base - base, config.beta),
        "direct_gap": gap(judge, direct - base, config.beta),
        "outcome_gap": gap(outcome_judge, exact.outcome_log_prob(direct) - outcome_base, config.beta),
        "separate_gap": gap(judge, separate - base, config.beta),
    }
    for name, log_prob in (("z_judge_gap", on_z), ("z_judge_gap_independent", exact.log_prob(solved))):
        found[name] = gap(z_judge, exact.outcome_log_prob(log_prob) - outcome_base, config.beta)
    return found


def align(
    exact: ExactSystem, judges: Sequence[Float[np.ndarray, "x s"]], reference: Params, config: Config
) -> list[Params]:
    """For each judge minimise the library's SysDPO-Direct loss on the population, from the reference."""
    populations = [system_population(exact, rewards) for rewards in judges]
    solve = lbfgs(population_loss(DirectObjective(config.beta), populations[0], reference), config.steps)
    return [solve(reference, population.share) for population in populations]


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


def gap(rewards: Float[np.ndarray, "x n"], log_ratio: Float[np.ndarray, "x n"], beta: float) -> float:
    """Largest residual over all x and pairs. Log-odds and log-ratios are differences, so it is a range for each x."""
    return float(np.ptp(rewards - beta * log_ratio, axis=1).max())


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One row a system, one column a gap."""
    names = list(next(iter(results.values())))
    lines = ["Largest residual of beta-perfect alignment, in nats", "  ".join([f"{'system':<14}", *names])]
    for system, gaps in results.items():
        shown = (
            f"{value:>{len(name)}.1e}" if value < 1e-3 else f"{value:>{len(name)}.4f}" for name, value in gaps.items()
        )
        lines.append("  ".join([f"{system:<14}", *shown]))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Write config.json and results.json, `{system: {gap: nats}}`, and print them."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    # In float64 the solvers can go to the end: what gap is left is the method's or the graph's, not rounding's.
    with jax.enable_x64(True):
        results = {exact.name: verify(exact, config) for exact in SYSTEMS}
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1, default=str))
    (config.folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
