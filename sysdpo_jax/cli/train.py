"""Align a system of your own from preferences: models, graph, data and schedule come from a YAML file.

    python -m sysdpo_jax.cli.train --config sysdpo_jax/recipes/smollm2_sd15.yaml --dry-run
    python -m sysdpo_jax.cli.train --config sysdpo_jax/recipes/smollm2_sd15.yaml --schedule.steps 200

Every field of the file is also a flag; flags win. Given again, the command goes on from the newest checkpoint of the
run's directory. SIGTERM saves and ends the process with `preempted_exit_code`. One process on one device needs nothing
more; several find each other by what Slurm, GKE or Cloud TPU put into their environment, and share the directory.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

import sysdpo_jax as sj
from sysdpo_jax.cli.caches import keep_compilations
from sysdpo_jax.cli.config import TrainConfig, parse
from sysdpo_jax.cli.dry_run import describe_run
from sysdpo_jax.cli.ending import Terminated, bounded_exit, user_errors
from sysdpo_jax.cli.evaluation import make_evaluation
from sysdpo_jax.cli.report import result_lines, write_run_report
from sysdpo_jax.cli.run import (
    Run,
    assemble,
    check_first,
    check_run_dir,
    describe_data,
    make_batches,
    make_trainer,
    read_preferences,
    refuse_others,
)
from sysdpo_jax.data.batches import PreferenceBatches
from sysdpo_jax.locks import locked_folder


def train(config: TrainConfig, arguments: list[str]) -> None:
    """Train until the last step, from the newest checkpoint if there is one, and write report.html.

    Raises `ConfigError`, `RecordError` and the like for what cannot be used, with the folder as it was but for what
    tools gave for the preferences, and `Preempted` when asked to stop.
    """
    began, folder = time.monotonic(), Path(config.directory)
    keep_compilations(config.compilation_cache)
    check_first(config)
    run = assemble(config)
    trainer = make_trainer(run, make_evaluation(run))
    records = read_preferences(run)
    batches = make_batches(run, records)
    if config.dry_run:
        for part in describe_run(run, batches, folder / "dry_run"):
            print(part, flush=True)
        return
    first, about = jax.process_index() == 0, describe_data(run, records)
    if first:
        print(records.summary(), file=sys.stderr, flush=True)
        if isinstance(batches, PreferenceBatches):
            print(batches.describe(), file=sys.stderr, flush=True)
        refuse_others(run, about)
    begun = False

    def accepted() -> None:
        nonlocal begun
        check_run_dir(run, about)
        begun = True

    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    try:
        trainer.fit(state, batches, config.schedule.steps, run.key, config.resume, accepted)
    finally:
        # After a stop or a value that is not finite the report is wanted most.
        if begun:
            tell_result(run, arguments, began)


def tell_result(run: Run, arguments: list[str], began: float) -> None:
    """Print the result and the report's path. Without a report the training is what it was, and so is what ended it."""
    try:
        for line in result_lines(run):
            print(line, flush=True)
        print(write_run_report(run, arguments, began), flush=True)
    except Exception as error:
        print(f"warning: the report is not written: {error}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """Train, or say what training would be."""
    with user_errors():
        config = parse(arguments, __doc__)
        try:
            with own_folder(config):
                train(config, arguments)
        except sj.Preempted:
            raise SystemExit(config.preempted_exit_code) from None
        except Terminated:
            # Before the first step or after the last one.
            raise Terminated(config.preempted_exit_code) from None


def own_folder(config: TrainConfig) -> AbstractContextManager[None]:
    """The run's folder is this command's alone, from before it reads what may be long: process 0 of several has it."""
    writes = config.directory and not config.dry_run and jax.process_index() == 0
    return locked_folder(Path(config.directory)) if writes else nullcontext()


if __name__ == "__main__":
    with bounded_exit():
        sj.initialize()
        main(sys.argv[1:])
