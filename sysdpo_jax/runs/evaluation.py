"""What measures a run: the scorer, held-out evaluation and rounds that its configuration asks for."""

import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from sysdpo_jax.data.files import LINES, TABLE
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.evaluation import too_few
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.scoring import about_scorer, check_scorer, make_scorer
from sysdpo_jax.io import file_digest
from sysdpo_jax.manifest import digest
from sysdpo_jax.models.remat import SETTINGS
from sysdpo_jax.report.outcome import BEST
from sysdpo_jax.runs.caches import prepared_folder
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.held_out import FOLDER, HeldOut, RunScorer
from sysdpo_jax.runs.online import OnlineTraining
from sysdpo_jax.runs.rounds import check_watched
from sysdpo_jax.runs.run import Run, is_online, make_batches, round_store
from sysdpo_jax.runs.runs_file import read_prompts
from sysdpo_jax.runs.serving import sampling_system
from sysdpo_jax.training import Evaluation
from sysdpo_jax.user_code import import_function


def check_first(config: TrainConfig, rounds: bool = False) -> None:
    """Raise `ConfigError` for what is wrong whatever the models are: before they are loaded, which takes a while.

    That is a field that must be given, a file that is missing, and an evaluation that is half given or whose scorer or
    judge cannot be had. rounds: of a run that makes its preferences itself.
    """
    own, online = config.evaluation, is_online(config)
    if not config.directory:
        raise ConfigError("directory is empty: name the folder of the run, for example runs/my_run")
    if not rounds and online:
        raise ConfigError("online.prompts is given, and rounds make their own preferences: use `sysdpo online`")
    if not rounds and not config.data.source:
        raise ConfigError("data.source is empty: give a JSONL or Parquet file of preferences, or a dataset on the hub")
    if rounds:
        if not online:
            raise ConfigError("online.prompts is empty: give the prompts that the rounds make runs of")
        if config.data.source:
            rule = "rounds make their own preferences: leave it out, or give --data.source ''"
            raise ConfigError(f"data.source is given, and {rule}")
        if not own.prompts:
            raise ConfigError(
                "evaluation.prompts is empty: give held-out prompts, which say when the rounds should end"
            )
        if config.dry_run:
            raise ConfigError("dry_run is of `sysdpo train`, which has its preferences: leave it out")
        check_watched(config.online.stop_on, config.online.figures, "online.")
    if config.remat is not None and config.remat not in SETTINGS:
        raise ConfigError(f"remat: unknown policy {config.remat!r}: {meant(config.remat, SETTINGS)}")
    files = {"data.source": config.data.source, "online.prompts": config.online.prompts}
    for name, path in (files | {"evaluation.prompts": own.prompts}).items():
        if Path(path).suffix in (*LINES, *TABLE, ".txt") and not Path(path).exists():
            raise ConfigError(f"{name} {path} does not exist: give the file")
    if own.prompts:
        scorer = make_scorer(own.scorer, own.judge, "evaluation.")
        check_scorer(scorer, (*config.system.inputs, *config.system.nodes), "the system")
        return
    given = {"scorer": own.scorer, "judge": own.judge != JudgeConfig(), "ignore": own.ignore}
    names = " and ".join(f"evaluation.{name}" for name, value in given.items() if value)
    if names:
        raise ConfigError(f"evaluation.prompts is empty: give the held-out prompts too, or leave {names} out")


def make_evaluation(run: Run) -> Evaluation | None:
    """The evaluation that the configuration asks for, None for none. Raises `ConfigError`, also as `HeldOut.check`."""
    config = run.config.evaluation
    if not config.prompts:
        return None
    stop_on = None if config.patience is None else (*BEST, config.patience)
    return make_held_out(run).evaluation(config.every, stop_on)


def make_held_out(run: Run) -> HeldOut:
    """What an evaluation of the run measures, its folder checked. Warns of few prompts."""
    config, figures = run.config.evaluation, run.config.online.figures
    about = {
        **{name: str(getattr(config, name)) for name in ("samples", "batch_size")},
        "prompts": file_digest(Path(config.prompts)),
        **{f"figure {name}": function for name, function in figures.items()},
    }
    prompts = read_prompts(config.prompts, run.system, config.ignore)
    maker, folder = _run_scorer(run, config.batch_size, about, figures), Path(run.config.directory) / FOLDER
    held_out = HeldOut(maker, prompts, config.samples, run.config.seed, folder, digest(run.identity))
    held_out.check()
    few = too_few(len(held_out.prompts))
    if few and jax.process_index() == 0:
        print(f"warning: evaluation.prompts {config.prompts}: {few}", file=sys.stderr, flush=True)
    return held_out


def make_online(run: Run) -> OnlineTraining:
    """The rounds that the configuration asks for. Raises `ConfigError` for files and settings that cannot be used."""
    config, own = run.config, run.config.evaluation
    store = round_store(run)
    return OnlineTraining(
        store,
        read_prompts(config.online.prompts, run.system, own.ignore),
        _run_scorer(run, config.online.batch_size, {"configuration": digest(run.identity)}, {}),
        prepared_folder(config.prepared_cache, Path(config.directory)),
        make_held_out(run),
        own.every,
        own.patience,
        lambda records, seed: make_batches(run, records, seed),
    )


def _run_scorer(run: Run, batch_size: int, about: Mapping[str, str], figures: Mapping[str, str]) -> RunScorer:
    """With the scorer or judge of the evaluation. figures: names of functions."""
    own = run.config.evaluation
    scorer = make_scorer(own.scorer, own.judge, "evaluation.")
    made = {name: import_function(function, f"online.figures.{name}") for name, function in figures.items()}
    asked = {**about_scorer(own.scorer, own.judge), **about}
    system = sampling_system(run.config, run.system)
    return RunScorer(system, scorer, own.judge.parallel, own.on_error == "skip", batch_size, asked, made)
