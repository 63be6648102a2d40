"""Align a system in rounds on preferences between its own runs: sample, score, pair, train, evaluate, and again.

example:
  sysdpo online my_run.yaml --online.prompts prompts.txt --rounds 2

The file is that of `sysdpo train` without `data` (--data.source '' leaves out a recipe's). The scorer or judge of its
`evaluation` scores the runs of every round; its held-out prompts say when to stop and which evaluation is the best.
`schedule.steps` counts the updates of one round. Given again, the command resumes where it was stopped, within a round
too, and a finished run continues with more rounds. Several processes find each other as in training.
"""

import time
from dataclasses import dataclass, fields, replace

from sysdpo_jax.cli.report import reported
from sysdpo_jax.cli.train import stoppable
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.evaluation import check_first, make_online
from sysdpo_jax.runs.run import assemble, describe_data
from sysdpo_jax.typing import Positive

SHOWN = (
    "directory",
    "online.prompts",
    "rounds",
    "online.samples",
    "online.reference",
    "online.mix",
    "objective.beta",
    "schedule.steps",
    "schedule.learning_rate",
    "evaluation.prompts",
    "evaluation.scorer",
    "init_from",
)


@dataclass(frozen=True)
class Config(TrainConfig):
    """A run, whose fields are those of `sysdpo train`.

    Args:
        rounds: Short for --online.rounds.
    """

    rounds: Positive | None = None


def run(config: Config) -> None:
    """Do the rounds that are missing. Raises as `align`, and SystemExit where it was stopped."""
    rounds = config.online.rounds if config.rounds is None else config.rounds
    given = TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
    with stoppable(given):
        align(replace(given, online=replace(given.online, rounds=rounds)))


def align(config: TrainConfig) -> None:
    """Do the rounds that are missing, and write report.html.

    Raises `ConfigError`, `RecordError` and the like for what cannot be used, and `Preempted` when asked to stop.
    """
    began = time.monotonic()
    keep_compilations(config.compilation_cache)
    check_first(config, rounds=True)
    run = assemble(config)
    training = make_online(run)
    with reported(run, describe_data(run), began) as accepted:
        training.run(run.params, accepted)
