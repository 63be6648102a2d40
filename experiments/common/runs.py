"""An experiment from its command to its files: phases of every training seed, figures of held-out runs."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from experiments.common.command import experiment_folder, made_by, parse_preset
from experiments.common.phases import Phases
from sysdpo_jax import CompoundSystem, rollout
from sysdpo_jax.io import read_arrays, write_arrays
from sysdpo_jax.keys import named_key
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.training import Board, Report
from sysdpo_jax.typing import Params, Record

Figures = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """How held-out runs are made.

    Args:
        evaluate_on: Split of the held-out inputs.
        test_samples: Runs of each held-out input.
        best_of: The N of best-of-n.
        batch_runs: Runs that are sampled together.
    """

    evaluate_on: Literal["validation", "test"] = "test"
    test_samples: int
    best_of: int = 4
    batch_runs: int = 256


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment.

    Args:
        preset: Sizes to start from.
        seeds: Seeds of training; each makes one run of everything.
        folder: Folder for all that is kept.
        run: Settings of one seed's run.
    """

    preset: str
    seeds: tuple[int, ...]
    folder: Path
    run: HeldOutConfig


C = TypeVar("C", bound=ExperimentConfig)


class SeedRun:
    """One seed in a folder of its own."""

    def __init__(self, config: "ExperimentConfig", system: CompoundSystem, seed: int, folder: Path, board: Board):
        self.config: Any = config.run
        self.system, self.seed, self.folder = system, seed, folder
        self.phases = Phases(folder, f"seed {seed}", board)

    def run(self) -> Any:
        """Do what is missing; the figures."""
        raise NotImplementedError

    def held_out(self) -> Sequence[Record]:
        """The inputs of `config.evaluate_on`."""
        raise NotImplementedError

    def figures(self, params: Params, records: Sequence[Record]) -> dict[str, np.ndarray]:
        """Columns of held-out runs, in the order of their inputs; "score" is one. A single number is of all of them."""
        raise NotImplementedError

    def key(self, name: str) -> PRNGKeyArray:
        """The seed's key for this use."""
        return named_key(jax.random.key(self.seed), name)

    def rollout(
        self, params: Params, inputs: Sequence[Record], samples: int, key: PRNGKeyArray, report: Report
    ) -> list[dict[str, Any]]:
        """Runs of the system, whose number so far is on the phase's bar."""
        done = 0

        def count(made: int) -> None:
            nonlocal done
            done += made
            report(done, "")

        return rollout(self.system, params, inputs, key, samples, self.config.batch_runs, count)

    def evaluate(self, name: str, params: Params, repeat: int = 0) -> dict[str, np.ndarray]:
        """Figures of held-out runs. The key depends on the repeat alone: every method draws the same noise."""
        inputs, samples = self.held_out(), self.config.test_samples
        label = f"evaluate_{name}" if repeat == 0 else f"evaluate_{name}_{repeat}"

        def make(report: Report) -> dict[str, np.ndarray]:
            key = jax.random.fold_in(self.key("evaluate"), repeat)
            return self.figures(params, self.rollout(params, inputs, samples, key, report))

        path = self.folder / f"{label}.npz"
        return self.phases.run(label, path, len(inputs) * samples, make, read_arrays, write_arrays)

    def best_of_n(self, name: str, params: Params) -> dict[str, np.ndarray]:
        """For every held-out run the one with the highest score of N runs; numbers of all runs are averaged."""
        runs = [self.evaluate(name, params, repeat) for repeat in range(self.config.best_of)]
        columns = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
        best = np.argmax(columns["score"], axis=0)
        return {
            name: column[best, np.arange(len(best))] if column.ndim > 1 else column.mean()
            for name, column in columns.items()
        }


def run_experiment(
    module: str,
    description: str | None,
    presets: Mapping[str, C],
    make: Callable[[C, int, Path, Board], SeedRun],
    write: Callable[[C, Mapping[int, Any], Mapping[int, Any], dict[str, Any]], None],
    arguments: Sequence[str],
) -> None:
    """Run what is missing of every seed, and write what it came to.

    make: of the configuration, a seed and its folder. write: {seed: run}, {seed: what its `run` returned}, and what the
    results say of how they were made.
    """
    began = time.monotonic()
    config = parse_preset(presets, arguments, description)
    with experiment_folder(config.folder, config.run):
        runs, figures = run_seeds(
            config.seeds, lambda seed, board: make(config, seed, config.folder / f"seed-{seed}", board)
        )
        phases = {f"seed {seed} {name}": s for seed, run in runs.items() for name, s in run.phases.seconds.items()}
        about = made_by(module, arguments, note=f", {jax.devices()[0].device_kind}")
        about |= {"jax": jax.__version__, "seconds_of_this_start": round(time.monotonic() - began, 1)}
        how = {"seeds": list(runs), "phases": phases, "evaluated_on": config.run.evaluate_on, "made_by": about}
        write(config, runs, figures, how)


def run_seeds(seeds: Sequence[int], make: Callable[[int, Board], SeedRun]) -> tuple[dict[int, SeedRun], dict[int, Any]]:
    """{seed: its run} and {seed: what its `run` returned}. Raises SystemExit for no seeds or one given twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, seeds))}: give one or more different numbers")
    with Board() as board:
        runs = {seed: make(seed, board) for seed in seeds}
        if len(runs) == 1:
            # In this thread, where Ctrl-C stops it.
            return runs, {seed: run.run() for seed, run in runs.items()}
        # Small models leave cores idle: seeds run side by side, and a device takes their work in turn.
        with DaemonExecutor(min(len(runs), os.cpu_count() or 1), "seed") as pool:
            figures = dict(zip(runs, pool.map(lambda run: run.run(), runs.values()), strict=True))
    return runs, figures
