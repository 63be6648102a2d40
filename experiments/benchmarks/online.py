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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.command import experiment_folder, parse_preset, provenance, run_seeds
from experiments.common.runs import as_numbers
from experiments.progressive.run import ROUNDS, RunConfig, SeedRun
from experiments.progressive_images import PRESETS as SIZES
from sysdpo_jax.evaluation import Estimate, clustered_mean, paired_difference
from sysdpo_jax.io import read_json, write_json
from sysdpo_jax.training import Board, read_metrics

# Figures of test requests, as `SeedRun.evaluate` names them.
FIGURES = ("score", "order")


@dataclass(frozen=True)
class Config:
    """What is measured.

    Args:
        preset: The sizes, as of the demo.
        seeds: Of training.
        folder: Of all that is kept.
        rounds: That are compared with one round.
        run: One seed's run.
    """

    preset: str = "full"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    folder: Path = Path("runs/online_rounds")
    rounds: int = 2
    run: RunConfig = SIZES["full"].run


PRESETS = {
    "full": Config(),
    "smoke": Config("smoke", (0,), Path("runs/online_rounds_smoke"), 2, SIZES["smoke"].run),
}


class RoundsRun:
    """One seed: one round and more of them."""

    def __init__(self, config: Config, seed: int, board: Board):
        folder = config.folder / f"seed-{seed}"
        self._run, self._rounds, self.folder = SeedRun(config.run, seed, folder, board), config.rounds, folder

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: seconds it took}."""
        return self._run.seconds

    def run(self) -> dict[str, Any]:
        """The figures of this seed, as online.json has them."""
        before = self._run.pretrained()
        one = self._run.in_rounds("one_round", before, 1)
        # Its phases are named by their number: a later command may ask for more.
        phase = f"rounds_{self._rounds}"
        more = self._run.in_rounds(phase, before, self._rounds)
        columns = {
            "before": self._run.evaluate("before", before),
            "one_round": self._run.evaluate("one_round", one),
            "more_rounds": self._run.evaluate(phase, more),
        }
        measured = {
            name: {figure: clustered_mean(each[figure], each["request"]) for figure in FIGURES}
            for name, each in columns.items()
        }
        last, first = columns["more_rounds"], columns["one_round"]
        gain = {figure: paired_difference(last[figure], first[figure], first["request"]) for figure in FIGURES}
        rows = [row for row in read_metrics(self.folder / ROUNDS / "metrics.jsonl") if "eval/score" in row]
        rounds = [read_json(path) for path in sorted((self.folder / ROUNDS).glob("round-*/done.json"))]
        return {
            "test": {name: _numbers(each) for name, each in measured.items()},
            "more_rounds - one_round": _numbers(gain),
            "validation": [{name: row[name] for name in ("step", "eval/score", "eval/order")} for row in rows],
            "rounds": rounds,
        }


def _numbers(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: as_numbers(estimate) for name, estimate in estimates.items()}


def summary(seeds: dict[int, dict[str, Any]], fall: float) -> dict[str, Any]:
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


def main(arguments: list[str]) -> None:
    """Run what is missing, write online.json, print what it came to."""
    began = time.monotonic()
    config = parse_preset(PRESETS, arguments, __doc__)
    with experiment_folder(config.folder, config.run):
        runs, found = run_seeds(config.seeds, lambda seed, board: RoundsRun(config, seed, board))
        made_by = provenance("experiments.benchmarks.online", arguments, runs, config.run.evaluate_on, began)
        results = summary(found, config.run.align.fall) | {"by_seed": found} | made_by
        path = config.folder / "online.json"
        write_json(path, results)
        for seed, each in found.items():
            one, more = (each["test"][name] for name in ("one_round", "more_rounds"))
            print(
                f"seed {seed}: score {one['score']['value']:.3f} -> {more['score']['value']:.3f}, order "
                f"{100 * one['order']['value']:.1f}% -> {100 * more['order']['value']:.1f}%"
            )
        print(f"{results['seeds in which more rounds win']} of {results['of']} seeds; {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
