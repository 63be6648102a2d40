"""Align a system of your own from preferences: models, graph, data and schedule come from a YAML file.

examples:
  sysdpo train quickstart --dry-run
  sysdpo train my_run.yaml --data.source preferences.jsonl --schedule.steps 200

Flags override the file's values. Given again, the command resumes from the newest checkpoint in the run's directory.
SIGTERM saves and ends the process with --preempted-exit-code. One process on one device needs nothing more; several
find each other by what Slurm, GKE or Cloud TPU put into their environment, and share the directory.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

import sysdpo_jax as sj
from sysdpo_jax.cli.ending import Terminated
from sysdpo_jax.cli.report import reported
from sysdpo_jax.data.batches import PreferenceBatches
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.dry_run import describe_run
from sysdpo_jax.runs.evaluation import check_first, make_evaluation
from sysdpo_jax.runs.run import assemble, describe_data, make_batches, make_trainer, owned, read_preferences

# What people change most.
SHOWN = (
    "directory",
    "data.source",
    "objective.kind",
    "objective.beta",
    "schedule.steps",
    "schedule.batch_size",
    "schedule.learning_rate",
    "evaluation.prompts",
    "evaluation.every",
    "dtype",
    "dry_run",
)
Config = TrainConfig


def train(config: TrainConfig) -> None:
    """Train until the last step, from the newest checkpoint if there is one, and write report.html.

    Raises `ConfigError`, `RecordError` and the like for what cannot be used, with the folder as it was but for what
    tools gave for the preferences, and `Preempted` when asked to stop.
    """
    began = time.monotonic()
    keep_compilations(config.compilation_cache)
    check_first(config)
    run = assemble(config)
    trainer = make_trainer(run, make_evaluation(run))
    records = read_preferences(run)
    batches = make_batches(run, records)
    if config.dry_run:
        for part in describe_run(run, batches, Path(config.directory) / "dry_run"):
            print(part, flush=True)
        return
    if jax.process_index() == 0:
        print(records.summary(), file=sys.stderr, flush=True)
        if isinstance(batches, PreferenceBatches):
            print(batches.describe(), file=sys.stderr, flush=True)
    with reported(run, describe_data(run, records), began) as accepted:
        state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
        trainer.fit(state, batches, config.schedule.steps, run.key, config.resume, accepted)


@contextmanager
def stoppable(config: TrainConfig) -> Iterator[None]:
    """The run's folder is this command's alone, and a stop ends the process with the configuration's code."""
    try:
        with owned(config):
            yield
    except sj.Preempted:
        raise SystemExit(config.preempted_exit_code) from None
    except Terminated:
        # Before the first step or after the last one, in a rollout for example.
        raise Terminated(config.preempted_exit_code) from None


def run(config: TrainConfig) -> None:
    """Train, or say what training would be. Raises as `train`, and SystemExit where it was stopped."""
    with stoppable(config):
        train(config)
