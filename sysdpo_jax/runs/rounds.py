"""The rounds of an online run: their settings, and what they leave in its folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.data.rollouts import Pairs
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import read_json
from sysdpo_jax.runs.config import Which
from sysdpo_jax.training import Evaluation, SystemOptimizer, Trainer, TrainState, create_state, read_metrics
from sysdpo_jax.training.metrics import EVALUATED
from sysdpo_jax.typing import Params

# In the folder of a round: what was planned, and what became of it.
PLAN, DONE = "plan.json", "done.json"
# The parameters of a checkpoint, and its step.
Restored = tuple[Params, int]


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


def check_watched(stop_on: Sequence[str], figures: Iterable[str], place: str) -> None:
    """Raise `ConfigError` where `stop_on`, a field of `place`, names what no held-out evaluation measures."""
    known = ("score", *figures)
    for name in stop_on:
        if name not in known:
            raise ConfigError(f"{place}stop_on {name!r} is no held-out figure: choose among {', '.join(known)}")


class RoundSummary(NamedTuple):
    """A round: the steps first ... last - 1.

    Args:
        first: Its first step.
        last: The step at which it ended.
        steps: That were planned.
        pairs: That it trained on.
        earlier: How many of them are of rounds before it.
        runs: That were made for it.
        score: Their mean score.
        stopped: Why the rounds end with it, None where they do not.
    """

    first: int
    last: int
    steps: int
    pairs: int
    earlier: int
    runs: int
    score: float
    stopped: str | None


@dataclass(frozen=True)
class RoundStore:
    """The rounds of a run in the trainer's directory, each in round-<number>/.

    trainer: Of every round but for its folder, evaluation and optimiser. optimizer: Of a round of so many steps; None
    for the trainer's in each.
    """

    trainer: Trainer
    rounds: Rounds
    seed: int
    optimizer: Callable[[int], SystemOptimizer] | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.trainer.directory)

    @property
    def key(self) -> PRNGKeyArray:
        """Of the noise of all steps, whose numbers go on from round to round."""
        return jax.random.key(self.seed + 1)

    @property
    def figure(self) -> str:
        """The metric of the rows that says which evaluation is the best."""
        return f"{EVALUATED}{self.rounds.stop_on[0]}"

    def round_folder(self, number: int) -> Path:
        """Of a round, counted from 1."""
        return self.folder / f"round-{number}"

    def summary(self, number: int) -> RoundSummary | None:
        """A round; None where it is not done."""
        path = self.round_folder(number) / DONE
        return RoundSummary(**read_json(path)) if path.exists() else None

    def summaries(self) -> tuple[RoundSummary, ...]:
        """The rounds that are done."""
        found = (self.summary(number) for number in range(1, self.rounds.number + 1))
        return tuple(summary for summary in found if summary is not None)

    def trainer_of(self, number: int, steps: int, evaluation: Evaluation | None = None) -> Trainer:
        """Of a round of so many steps."""
        return replace(
            self.trainer,
            directory=self.round_folder(number),
            log_directory=self.folder,
            optimizer=self.trainer.optimizer if self.optimizer is None else self.optimizer(steps),
            evaluation=evaluation,
            best=None if evaluation is None else (self.figure, "max"),
        )

    def state(self, trainer: Trainer, initial: Params, current: Params, first: int) -> TrainState:
        """The state in which a round begins, with the step `first`."""
        reference = initial if self.rounds.reference == "keep" else None
        return create_state(trainer.system, current, trainer.optimizer, trainer.mesh, reference=reference, step=first)

    def restored_round(self, number: int, initial: Params, current: Params, at: int | None = None) -> Restored:
        """A checkpoint of a round that began with `current`, and its step.

        at: The step; by default that with which the round ended, or the newest of one that is not done.
        """
        plan, done = read_json(self.round_folder(number) / PLAN), self.summary(number)
        trainer = self.trainer_of(number, plan["steps"])
        state = self.state(trainer, initial, current, plan["first"])
        with trainer.checkpoints(state, None, self.key, read_only=True) as checkpoints:
            wanted = at if at is not None else checkpoints.latest if done is None else done.last
            if wanted is None:
                return current, plan["first"]
            return checkpoints.restore(state, wanted).params, wanted

    def restored(self, params: Params, which: Which) -> Restored:
        """The parameters of the newest or the best checkpoint, and its step, of a run that may be going on.

        params: The first policy, which is the best of a run that became no better. Raises `ConfigError` where there is
        no such checkpoint.
        """
        target = self.best_step() if which == "best" else None
        if which == "best" and target is None:
            raise ConfigError(f"{self.folder} holds no best checkpoint: give it held-out prompts")
        if target == 0:
            return params, 0
        current, step, number = params, 0, 1
        while (self.round_folder(number) / "checkpoints").is_dir():
            done = self.summary(number)
            ends_here = target is not None and (done is None or target <= done.last)
            current, step = self.restored_round(number, params, current, target if ends_here else None)
            if ends_here:
                break
            number += 1
        if step == 0:
            raise ConfigError(f"{self.folder} holds no checkpoint: train first")
        return current, step

    def best_of(self, metric: str) -> tuple[float, int] | None:
        """The value and the step of the best evaluation, of equal ones the last; None where there is none."""
        path = self.folder / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return max(((row[metric], row["step"]) for row in rows if metric in row), default=None)

    def best_step(self) -> int | None:
        """The step of the best evaluation, None where there is none."""
        best = self.best_of(self.figure)
        return None if best is None else best[1]
