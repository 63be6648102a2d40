"""Two online rounds beside one, on the demo's world: held-out score and order consistency of several training seeds.

    python -m experiments.benchmarks.online [--preset smoke] [--seeds 0 1 2 3 4] [--folder runs/online_rounds]

Each seed pretrains both models, then aligns them by `sysdpo_jax.online`: after one round, and after up to `rounds` of
them, the parameters of the best evaluation on validation requests are measured on test requests, which no decision has
seen. What is in the folder is not done again. online.json has, for every seed, the figures, every round's validation
figures, and why rounds ended.

Expected: more rounds win in at least 4 of 5 seeds, and no validation figure of a finished run lies more than
`align.fall` below its best unless the run stopped there. A seed takes about ten minutes of one core.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.results import as_numbers
from experiments.common.runs import ExperimentConfig, run_experiment
from experiments.progressive.run import ROUNDS, RunConfig, SeedRun
from experiments.progressive_images import PRESETS as SIZES
from sysdpo_jax.evaluation import clustered_mean, paired_difference
from sysdpo_jax.io import read_json, write_json
from sysdpo_jax.training import Board, read_metrics

# Figures of test requests, as `SeedRun.figures` names them.
FIGURES = ("score", "order")


@dataclass(frozen=True)
class Config(ExperimentConfig):
    """What is measured.

    Args:
        rounds: That are compared with one round.
        run: One seed's run, of the sizes of the demo.
    """

    run: RunConfig
    rounds: int = 2


PRESETS = {
    "full": Config("full", (0, 1, 2, 3, 4), Path("runs/online_rounds"), SIZES["full"].run),
    "smoke": Config("smoke", (0,), Path("runs/online_rounds_smoke"), SIZES["smoke"].run),
}


class RoundsRun(SeedRun):
    """One seed: one round and more of them."""

    def __init__(self, config: Config, seed: int, folder: Path, board: Board):
        super().__init__(config, seed, folder, board)
        self.rounds = config.rounds

    def run(self) -> dict[str, Any]:
        """The figures of this seed, as online.json has them."""
        before = self.pretrained()
        # Phases of more rounds are named by their number: a later command may ask for more.
        phases = {"before": "before", "one_round": "one_round", "more_rounds": f"rounds_{self.rounds}"}
        policies = {"before": before, "one_round": self.in_rounds(phases["one_round"], before, 1)}
        policies["more_rounds"] = self.in_rounds(phases["more_rounds"], before, self.rounds)
        columns = {name: self.evaluate(phases[name], params) for name, params in policies.items()}
        last, first = columns["more_rounds"], columns["one_round"]
        rows = [row for row in read_metrics(self.folder / ROUNDS / "metrics.jsonl") if "eval/score" in row]
        return {
            "test": {
                name: {figure: as_numbers(clustered_mean(each[figure], each["request"])) for figure in FIGURES}
                for name, each in columns.items()
            },
            "more_rounds - one_round": {
                figure: as_numbers(paired_difference(last[figure], first[figure], first["request"]))
                for figure in FIGURES
            },
            "validation": [{name: row[name] for name in ("step", "eval/score", "eval/order")} for row in rows],
            "rounds": [read_json(path) for path in sorted((self.folder / ROUNDS).glob("round-*/done.json"))],
        }


def summary(seeds: Mapping[int, Mapping[str, Any]], fall: float) -> dict[str, Any]:
    """In how many seeds more rounds are better on test requests, and the falls that no run stopped at."""
    wins = sum(each["more_rounds - one_round"]["score"]["value"] > 0 for each in seeds.values())
    unstopped = [
        f"seed {seed}, step {row['step']}"
        for seed, each in seeds.items()
        for place, row in enumerate(each["validation"])
        if max(before["eval/order"] for before in each["validation"][: place + 1]) - row["eval/order"] > fall
        and not (each["rounds"][-1]["stopped"] and row["step"] == each["rounds"][-1]["last"])
    ]
    return {"seeds in which more rounds win": wins, "of": len(seeds), "falls without a stop": unstopped}


def write(config: Config, _: Any, found: Mapping[int, Any], how: dict[str, Any]) -> None:
    """Write online.json, and print what it came to."""
    results, path = summary(found, config.run.align.fall) | {"by_seed": found} | how, config.folder / "online.json"
    write_json(path, results)
    for seed, each in found.items():
        one, more = (each["test"][name] for name in ("one_round", "more_rounds"))
        print(
            f"seed {seed}: score {one['score']['value']:.3f} -> {more['score']['value']:.3f}, order "
            f"{100 * one['order']['value']:.1f}% -> {100 * more['order']['value']:.1f}%"
        )
    print(f"{results['seeds in which more rounds win']} of {results['of']} seeds; {path}")


def main(arguments: list[str]) -> None:
    """Run what is missing, write online.json, print what it came to."""
    run_experiment("experiments.benchmarks.online", __doc__, PRESETS, RoundsRun, write, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
