"""What the rounds of an online run are made of, and the preferences of a round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sysdpo_jax.data.rollouts import Pairs, preferred
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.runs.runs_file import Run, moved

# A line of a file of preferences.
Pair = dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """How many rounds an online run has, what each of them is made of, and what ends them early.

    Args:
        number: Of rounds. It may grow when the run goes on; nothing else may change.
        samples: Runs of each prompt that a round makes; a tuple has those of round 1, 2 ..., its last for all later.
        sample_batch: Runs that are sampled together; part of what is drawn.
        group: Runs of a prompt among which pairs are made; None for all of them.
        pairs: The best of a group against its worst, or all two.
        min_margin: Smallest difference of scores that makes a pair.
        mix: Share of pairs of earlier rounds among those that a round trains on, in [0, 1): drawn from all of them, and
            fewer where there are not as many.
        reference: "reset" makes the policy at the end of a round the reference of the next, "keep" keeps the first.
        steps: Updates of a round at most.
        epochs: Passes over a round's pairs at most, so that few pairs mean few steps; None for no limit.
        batch_size: Pairs a step.
        stop_on: Held-out figures that are watched, "score" or others that are measured; the first says which
            evaluation is the best.
        fall: How far a watched figure may lie below its best, whatever its noise; None for no such limit.

    Raises:
        ConfigError: For a value that no round can have.
    """

    number: int = 2
    samples: int | tuple[int, ...] = 8
    sample_batch: int = 64
    group: int | None = None
    pairs: Pairs = "best_worst"
    min_margin: float = 0.0
    mix: float = 0.0
    reference: Literal["reset", "keep"] = "reset"
    steps: int = 200
    epochs: int | None = 12
    batch_size: int = 32
    stop_on: tuple[str, ...] = ("score",)
    fall: float | None = None

    def __post_init__(self) -> None:
        counts = {"number": self.number, "sample_batch": self.sample_batch, "steps": self.steps}
        counts |= {"batch_size": self.batch_size, "epochs": self.epochs or 1}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"rounds: {name} {value} must be at least 1")
        if min(self.samples_of(number) for number in range(1, self.number + 1)) < 2:
            raise ConfigError(f"rounds: samples {self.samples}: a pair needs 2 runs of a prompt at least")
        if self.group is not None and self.group < 2:
            raise ConfigError(f"rounds: group {self.group}: a pair needs 2 runs at least")
        if not 0 <= self.mix < 1:
            raise ConfigError(f"rounds: mix {self.mix:g} is no share below 1 of a round's pairs")
        if not self.stop_on:
            raise ConfigError("rounds: stop_on is empty: name the figure that says which round is the best")
        if self.fall is not None and self.fall <= 0:
            raise ConfigError(f"rounds: fall {self.fall:g} must be above 0; leave it out for the noise alone")

    def samples_of(self, number: int) -> int:
        """The runs of each prompt in a round.

        Args:
            number: Of the round, counted from 1.

        Returns:
            How many.
        """
        if isinstance(self.samples, int):
            return self.samples
        return self.samples[min(number, len(self.samples)) - 1] if self.samples else 0

    def check_prompts(self, prompts: int) -> None:
        """Refuse prompts of which the first round cannot make the pairs of a step, before a run is made or paid for.

        Args:
            prompts: How many there are.

        Raises:
            ConfigError: Naming the numbers and what to change.
        """
        samples = self.samples_of(1)
        sizes = [min(self.group or samples, samples - start) for start in range(0, samples, self.group or samples)]
        most = prompts * sum(size > 1 if self.pairs == "best_worst" else size * (size - 1) // 2 for size in sizes)
        if most < self.batch_size:
            raise ConfigError(
                f"{prompts} prompts with {samples} runs each give {most} pairs at most, and a step takes "
                f"{self.batch_size}: give more prompts, smaller groups of runs, or a smaller batch_size of the schedule"
            )

    def steps_of(self, pairs: int, where: str) -> int:
        """The updates of a round.

        Args:
            pairs: That it has.
            where: Names it, for the message.

        Returns:
            How many.

        Raises:
            ConfigError: For pairs that fill no batch.
        """
        if pairs < self.batch_size:
            raise ConfigError(
                f"{where} has {pairs} pairs, and a step takes {self.batch_size}: give more prompts or a smaller "
                "batch_size, in another directory"
            )
        return self.steps if self.epochs is None else min(self.steps, self.epochs * (pairs // self.batch_size))


def made_pairs(rows: Sequence[Run], rounds: Rounds) -> Iterator[Pair]:
    """The preferences within groups of adjacent runs of a prompt, both of which have a score.

    rows: as `RunScorer.rows` returns them.
    """
    for _, of_prompt in groupby(rows, lambda row: row["id"].rpartition("-")[0]):
        runs = list(of_prompt)
        size = rounds.group or len(runs)
        for start in range(0, len(runs), size):
            scored = [run for run in runs[start : start + size] if run["score"] is not None]
            if len(scored) < 2:
                continue
            scores = np.array([run["score"] for run in scored], np.float64)
            for better, worse in preferred(scores, rounds.pairs, rounds.min_margin):
                chosen, rejected = scored[better], scored[worse]
                yield {"inputs": chosen["inputs"], "chosen": chosen["outputs"], "rejected": rejected["outputs"]}


def earlier_pairs(pairs: Sequence[Pair], own: int, mix: float, seed: Sequence[int]) -> list[Pair]:
    """As many of the pairs of earlier rounds as make the share `mix` beside `own` new ones, or all there are."""
    wanted = min(len(pairs), round(mix / (1 - mix) * own))
    drawn = np.random.default_rng(seed).choice(len(pairs), wanted, replace=False) if wanted else np.zeros(0, int)
    return [pairs[place] for place in np.sort(drawn).tolist()]


def moved_pair(pair: Pair, source: Path, target: Path) -> Pair:
    """A pair of the file `source` with the paths of images as a file at `target` has them."""
    return {part: moved(value, source, target) for part, value in pair.items()}
