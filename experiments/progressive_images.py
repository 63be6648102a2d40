"""The main experiment: a language model writes three captions, a diffusion model draws them, aligned as one system.

    python -m experiments.progressive_images [--preset smoke] [--seeds 0 1] [--folder runs/progressive_images]

Eight methods are compared on held-out requests (arXiv 2502.17721, section 5 in kind, at laptop size). Phases whose
output is in the folder are not repeated, so the command can be stopped and given again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.common.command import read_presets
from experiments.common.runs import ExperimentConfig, run_experiment
from experiments.progressive.report import RESULTS
from experiments.progressive.run import RunConfig, SeedRun


@dataclass(frozen=True)
class Config(ExperimentConfig):
    """Of this experiment."""

    run: RunConfig


FULL = Config("full", (0, 1), Path("runs/progressive_images"), RunConfig())
PRESETS = read_presets(FULL, Path(__file__).parent / "progressive" / "settings.yaml")


def main(arguments: list[str]) -> None:
    """Run what is missing, write results.json, report.html and the picture, print the table."""
    run_experiment("experiments.progressive_images", __doc__, PRESETS, SeedRun, RESULTS.write, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
