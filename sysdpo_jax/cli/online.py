"""Align a system in rounds on preferences between its own runs: sample, score, pair, train, evaluate, and again.

example:
  sysdpo online my_run.yaml --online.prompts prompts.txt --rounds 2

The file is that of `sysdpo train` without `data`: the scorer or judge of its `evaluation` scores the runs of every
round, and its held-out prompts say when to stop and which evaluation is the best. `schedule.steps` are those of a
round. Given again, the command goes on where it was stopped, within a round too; with more rounds a finished run
goes on. Several processes find each other as in training.
"""

import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli.report import tell_result
from sysdpo_jax.cli.train import stoppable
from sysdpo_jax.evaluation.scoring import about_scorer, make_scorer
from sysdpo_jax.io import file_digest
from sysdpo_jax.manifest import digest
from sysdpo_jax.runs.caches import keep_compilations, prepared_folder
from sysdpo_jax.runs.checks import check_rounds
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.evaluation import make_held_out
from sysdpo_jax.runs.online_training import OnlineTraining
from sysdpo_jax.runs.prompts import read_prompts
from sysdpo_jax.runs.run import Run, assemble, check_run_dir, make_batches, refuse_others, round_store
from sysdpo_jax.runs.scored_runs import RunScorer
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
        rounds: In short for online.rounds.
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
    check_rounds(config)
    made = assemble(config)
    training, about = make_online(made), describe_prompts(made)
    if jax.process_index() == 0:
        refuse_others(made, about)
    begun = False

    def accepted() -> None:
        nonlocal begun
        check_run_dir(made, about)
        begun = True

    try:
        training.run(made.params, accepted)
    finally:
        # After a stop or a value that is not finite the report is wanted most, once there is something to report.
        if begun and (Path(config.directory) / "metrics.jsonl").exists():
            tell_result(made, began)


def make_online(made: Run) -> OnlineTraining:
    """The rounds that the configuration asks for. Raises `ConfigError` for files and settings that cannot be used."""
    config = made.config
    judge, store = config.evaluation.judge, round_store(made)
    maker = RunScorer(
        made.system,
        make_scorer(config.evaluation.scorer, judge, "evaluation."),
        judge.parallel,
        config.evaluation.on_error == "skip",
        config.online.batch_size,
        about_scorer(config.evaluation.scorer, judge) | {"configuration": digest(made.identity)},
    )
    return OnlineTraining(
        store,
        read_prompts(config.online.prompts, made.system, config.evaluation.ignore),
        maker,
        prepared_folder(config.prepared_cache, Path(config.directory)),
        make_held_out(made),
        config.evaluation.every,
        config.evaluation.patience,
        lambda records, seed: make_batches(made, records, seed),
    )


def describe_prompts(made: Run) -> dict[str, Any]:
    """What the folder and the model cards of an online run say of its data: the prompts, whose runs became pairs."""
    prompts = made.config.online.prompts
    about = {"source": prompts, "kept": None, "sha256": file_digest(Path(prompts)), **made.origin}
    return asdict(made.config.data) | about
