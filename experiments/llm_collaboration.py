"""The second experiment: a language model drafts, another answers; SysDPO-Sampling aligns both from answers alone.

    python -m experiments.llm_collaboration [--preset full | smoke | smollm2] [--seeds 0 1] [--folder runs/...]

Eight methods are compared on held-out questions (arXiv 2502.17721, the LLM -> LLM experiment in kind): "full" and
"smoke" with tiny models trained from scratch, "smollm2" with SmolLM2-135M-Instruct twice. Phases whose output is in the
folder are not repeated, so the command can be stopped and given again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.collaboration.report import RESULTS
from experiments.collaboration.run import RunConfig, SeedRun
from experiments.collaboration.small import SmallTask
from experiments.collaboration.smollm import SmolLMTask
from experiments.common.command import read_presets
from experiments.common.runs import ExperimentConfig, run_experiment


@dataclass(frozen=True)
class Config(ExperimentConfig):
    """Of this experiment."""

    run: RunConfig


FULL = Config("full", (0, 1), Path("runs/llm_collaboration"), RunConfig(task=SmallTask()))
SMOLLM2 = RunConfig(task=SmolLMTask(), test_samples=2, batch_runs=64)
PRESETS = read_presets(FULL, Path(__file__).parent / "collaboration" / "settings.yaml") | {
    "smollm2": Config("smollm2", (0,), Path("runs/llm_collaboration_smollm2"), SMOLLM2)
}


def main(arguments: list[str]) -> None:
    """Run what is missing, write results.json, report.html and table.md, print the table."""
    run_experiment("experiments.llm_collaboration", __doc__, PRESETS, SeedRun, RESULTS.write, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
