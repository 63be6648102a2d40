"""The main experiment: a language model writes three captions, a diffusion model draws them, aligned as one system.

    python -m experiments.progressive_images [--preset smoke] [--seeds 0 1] [--folder runs/progressive_images]

Eight methods are compared on held-out requests (arXiv 2502.17721, section 5 in kind, at laptop size). Phases whose
output is in the folder are not repeated, so the command can be stopped and given again.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.progressive.align import AlignConfig
from experiments.progressive.pretrain import FitConfig
from experiments.progressive.report import print_table, write
from experiments.progressive.results import summarise
from experiments.progressive.run import RunConfig, SeedRun
from experiments.progressive.world import World
from sysdpo_jax.training.progress import Board


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
            align=AlignConfig(steps=80, batch_size=16, samples=64, online_samples=32, min_margin=0.2),
            test_samples=16,
            local_samples=8,
            batch_runs=128,
        ),
    ),
}


def parse(arguments: list[str]) -> Config:
    """The command line: the preset's values, replaced by any flag."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", choices=tuple(PRESETS), default="full")
    preset = early.parse_known_args(arguments)[0].preset
    return tyro.cli(Config, args=arguments, default=PRESETS[preset], description=__doc__)


def main(arguments: list[str]) -> None:
    """Run what is missing, write results.json, report.html and the picture, print the table."""
    config = parse(arguments)
    began = time.monotonic()
    _claim(config)
    # Methods and seeds compile the same steps: compile each once.
    jax.config.update("jax_compilation_cache_dir", str((config.folder / "compiled").absolute()))
    with Board() as board:
        runs = {seed: SeedRun(config.run, seed, config.folder / f"seed-{seed}", board) for seed in config.seeds}
        # Small models leave cores idle: seeds run side by side, and a device takes their work in turn.
        with ThreadPoolExecutor(min(len(runs), os.cpu_count() or 1)) as pool:
            figures = dict(zip(runs, pool.map(SeedRun.run, runs.values()), strict=True))
    results = summarise(figures) | {
        "seeds": list(config.seeds),
        "phases": {f"seed {seed} {name}": s for seed, run in runs.items() for name, s in run.seconds.items()},
        "evaluated_on": config.run.evaluate_on,
        "made_by": _provenance(arguments, time.monotonic() - began),
    }
    path = config.folder / "results.json"
    path.write_text(json.dumps(results, indent=1))
    write(config.folder, results, runs, figures)
    print_table(results)
    print(f"\n{path}\n{config.folder / 'report.html'}")


def _claim(config: Config) -> None:
    """The folder belongs to one configuration: phases of another must not be taken for this one's."""
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "config.json"
    wanted = json.dumps(dataclasses.asdict(config.run), indent=1)
    if path.exists() and path.read_text() != wanted:
        raise SystemExit(f"{config.folder} holds a run of another configuration (see {path}): choose another --folder")
    path.write_text(wanted)


def _provenance(arguments: list[str], seconds: float) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m experiments.progressive_images", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "seconds_of_this_start": round(seconds, 1),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
