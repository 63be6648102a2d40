"""The second experiment: a language model drafts, another answers; SysDPO-Sampling aligns both from answers alone.

    python -m experiments.llm_collaboration [--preset full | smoke | smollm2] [--seeds 0 1] [--folder runs/...]

Eight methods are compared on held-out questions (arXiv 2502.17721, the LLM -> LLM experiment in kind): "full" and
"smoke" with tiny models trained from scratch, "smollm2" with SmolLM2-135M-Instruct twice. Phases whose output is in the
folder are not repeated, so the command can be stopped and given again.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.collaboration.arithmetic import World
from experiments.collaboration.report import print_table, write
from experiments.collaboration.results import summarise
from experiments.collaboration.run import RunConfig, SeedRun
from experiments.collaboration.small import SmallTask
from experiments.collaboration.smollm import SmolLMTask
from experiments.common.command import experiment_folder, parse_preset, provenance, run_seeds
from experiments.common.fit import FitConfig
from sysdpo_jax.io import write_json


@dataclass(frozen=True)
class Config:
    """preset: the sizes to start from; seeds: of training, one run of everything each."""

    preset: str
    seeds: tuple[int, ...]
    folder: Path
    run: RunConfig


SMALL = SmallTask()
PRESETS = {
    "full": Config("full", (0, 1), Path("runs/llm_collaboration"), RunConfig(SMALL)),
    # A smaller world, which shows an improvement in a minute, most of it compilation.
    "smoke": Config(
        "smoke",
        (0,),
        Path("runs/llm_collaboration_smoke"),
        RunConfig(
            replace(
                SMALL,
                world=World(names=("ana", "bob", "cyd", "dan"), values=5, facts=3),
                width=48,
                pretraining=FitConfig(steps=600, learning_rate=5e-3, batch_size=128, examples=16384),
                train_questions=128,
                validation_questions=64,
                test_questions=128,
                align=replace(SMALL.align, steps=60, batch_size=32, num_intermediates=4),
            ),
            best_of=2,
        ),
    ),
    "smollm2": Config(
        "smollm2", (0,), Path("runs/llm_collaboration_smollm2"), RunConfig(SmolLMTask(), test_samples=2, batch_runs=64)
    ),
}


def main(arguments: list[str]) -> None:
    """Run what is missing, write results.json, report.html and table.md, print the table."""
    began = time.monotonic()
    config = parse_preset(PRESETS, arguments, __doc__)
    with experiment_folder(config.folder, config.run):
        runs, figures = run_seeds(
            config.seeds, lambda seed, board: SeedRun(config.run, seed, config.folder / f"seed-{seed}", board)
        )
        made_by = provenance("experiments.llm_collaboration", arguments, runs, config.run.evaluate_on, began)
        results = summarise(figures) | made_by
        path = config.folder / "results.json"
        write_json(path, results)
        write(config.folder, results, runs, figures)
        print_table(results)
        print(f"\n{path}\n{config.folder / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
