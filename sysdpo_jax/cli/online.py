"""Align a system in rounds on preferences between its own runs: sample, score, pair, train, evaluate, and again.

    python -m sysdpo_jax.cli.online --config my_run.yaml --online.prompts prompts.txt --online.rounds 2

The file is that of `sysdpo train` without `data`: the scorer or judge of its `evaluation` scores the runs of every
round, and its held-out prompts say when to stop and which evaluation is the best. `schedule.steps` are those of a
round. Given again, the command goes on where it was stopped, within a round too; with more rounds a finished run
goes on. Several processes find each other as in training.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli.caches import keep_compilations, prepared_folder
from sysdpo_jax.cli.config import TrainConfig, parse
from sysdpo_jax.cli.ending import Terminated, bounded_exit, user_errors
from sysdpo_jax.cli.evaluation import make_held_out
from sysdpo_jax.cli.prompts import read_prompts
from sysdpo_jax.cli.run import Run, assemble, check_rounds, check_run_dir, make_batches, refuse_others, round_store
from sysdpo_jax.cli.train import own_folder, tell_result
from sysdpo_jax.evaluation.scoring import about_scorer, make_scorer
from sysdpo_jax.io import file_digest
from sysdpo_jax.parallel.distributed import initialize
from sysdpo_jax.runs.online_training import OnlineTraining
from sysdpo_jax.runs.scored_runs import RunScorer
from sysdpo_jax.training.preemption import Preempted


def run(config: TrainConfig, arguments: list[str]) -> None:
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
            tell_result(made, arguments, began)


def make_online(made: Run) -> OnlineTraining:
    """The rounds that the configuration asks for. Raises `ConfigError` for files and settings that cannot be used."""
    config = made.config
    judge, store = config.evaluation.judge, round_store(made)
    identity = hashlib.sha256(json.dumps(made.identity, sort_keys=True, default=str).encode()).hexdigest()[:32]
    maker = RunScorer(
        made.system,
        make_scorer(config.evaluation.scorer, judge, "evaluation."),
        judge.parallel,
        config.evaluation.on_error == "skip",
        config.online.batch_size,
        about_scorer(config.evaluation.scorer, judge) | {"configuration": identity},
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
    return {"source": prompts, "kept": None, "sha256": file_digest(Path(prompts)), **made.origin}


def main(arguments: list[str]) -> None:
    """Do the rounds."""
    with user_errors():
        # The number of rounds has a short name.
        words = [word.replace("--rounds", "--online.rounds", 1) if _is_rounds(word) else word for word in arguments]
        config = parse(words, __doc__)
        try:
            with own_folder(config):
                run(config, arguments)
        except Preempted:
            raise SystemExit(config.preempted_exit_code) from None
        except Terminated:
            # Between two steps, in a rollout for example.
            raise Terminated(config.preempted_exit_code) from None


def _is_rounds(word: str) -> bool:
    return word.split("=")[0] == "--rounds"


if __name__ == "__main__":
    with bounded_exit():
        initialize()
        main(sys.argv[1:])
