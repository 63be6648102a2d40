"""The evaluation that a configuration asks for."""

import sys
from pathlib import Path

import jax

from sysdpo_jax.evaluation import too_few
from sysdpo_jax.evaluation.scoring import about_scorer, make_scorer
from sysdpo_jax.io import file_digest
from sysdpo_jax.manifest import digest
from sysdpo_jax.report.outcome import BEST
from sysdpo_jax.runs.held_out import FOLDER, HeldOut
from sysdpo_jax.runs.prompts import read_prompts
from sysdpo_jax.runs.run import Run
from sysdpo_jax.training import Evaluation
from sysdpo_jax.user_code import import_function


def make_evaluation(run: Run) -> Evaluation | None:
    """The evaluation that the configuration asks for, None for none. Raises `ConfigError`, also as `HeldOut.check`."""
    config = run.config.evaluation
    if not config.prompts:
        return None
    stop_on = None if config.patience is None else (*BEST, config.patience)
    return make_held_out(run).evaluation(config.every, stop_on)


def make_held_out(run: Run) -> HeldOut:
    """What an evaluation of the run measures, its folder checked. Warns of few prompts."""
    config = run.config.evaluation
    scorer = make_scorer(config.scorer, config.judge, "evaluation.")
    held_out = HeldOut(
        run.system,
        read_prompts(config.prompts, run.system, config.ignore),
        scorer,
        config.judge.parallel,
        config.on_error == "skip",
        config.samples,
        config.batch_size,
        run.config.seed,
        Path(run.config.directory) / FOLDER,
        about_scorer(config.scorer, config.judge)
        | {
            "samples": str(config.samples),
            "batch_size": str(config.batch_size),
            "prompts": file_digest(Path(config.prompts)),
        }
        | {f"figure {name}": function for name, function in run.config.online.figures.items()},
        digest(run.identity),
        {
            name: import_function(function, f"online.figures.{name}")
            for name, function in run.config.online.figures.items()
        },
    )
    held_out.check()
    few = too_few(len(held_out.prompts))
    if few and jax.process_index() == 0:
        print(f"warning: evaluation.prompts {config.prompts}: {few}", file=sys.stderr, flush=True)
    return held_out
