"""The main experiment: a language model writes three captions, a diffusion model draws them, aligned as one system.

    python -m experiments.progressive_images [--preset smoke] [--seeds 0 1] [--folder runs/progressive_images]

Eight methods are compared on held-out requests (arXiv 2502.17721, section 5 in kind, at laptop size). Phases whose
output is in the folder are not repeated, so the command can be stopped and given again.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.common.command import experiment_folder, parse_preset, provenance, run_seeds
from experiments.common.fit import FitConfig
from experiments.progressive.align import AlignConfig
from experiments.progressive.report import print_table, write
from experiments.progressive.results import summarise
from experiments.progressive.run import RunConfig, SeedRun
from experiments.progressive.world import World
from sysdpo_jax.io import write_json


@dataclass(frozen=True)
class Config:
    """preset: the sizes to start from ("full" or "smoke"); seeds: of training, one run of everything each."""

    preset: str = "full"
    seeds: tuple[int, ...] = (0, 1)
    folder: Path = Path("runs/progressive_images")
    run: RunConfig = RunConfig()


PRESETS = {
    "full": Config(),
    # A smaller world, which shows an improvement in two minutes, half of them compilation.
    "smoke": Config(
        preset="smoke",
        seeds=(0,),
        folder=Path("runs/progressive_images_smoke"),
        run=RunConfig(
            world=World(attributes=("bright", "large"), validation=2, held_out=8),
            language=FitConfig(400, 3e-3, batch_size=32, examples=4096),
            image=FitConfig(700, 2e-3, batch_size=32, examples=4096, ema_decay=0.99),
            align=AlignConfig(steps=80, batch_size=16, samples=64, online_samples=32, min_margin=0.2, sample_batch=128),
            test_samples=16,
            local_samples=8,
            batch_runs=128,
        ),
    ),
}


def main(arguments: list[str]) -> None:
    """Run what is missing, write results.json, report.html and the picture, print the table."""
    began = time.monotonic()
    config = parse_preset(PRESETS, arguments, __doc__)
    with experiment_folder(config.folder, config.run):
        runs, figures = run_seeds(
            config.seeds, lambda seed, board: SeedRun(config.run, seed, config.folder / f"seed-{seed}", board)
        )
        made_by = provenance("experiments.progressive_images", arguments, runs, config.run.evaluate_on, began)
        results = summarise(figures) | made_by
        path = config.folder / "results.json"
        write_json(path, results)
        write(config.folder, results, runs, figures)
        print_table(results)
        print(f"\n{path}\n{config.folder / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
