"""What is wrong with a configuration whatever its models are: said before they are loaded, which takes a while."""

from collections.abc import Mapping
from pathlib import Path

from sysdpo_jax.data.files import LINES, TABLE
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.scoring import check_scorer, make_scorer
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.held_out import SCORE
from sysdpo_jax.runs.run import is_online


def check_first(config: TrainConfig) -> None:
    """Raise `ConfigError` for what is wrong whatever the models are: before they are loaded, which takes a while.

    That is a field that must be given, a file that is missing, and an evaluation that is half given or whose scorer or
    judge cannot be had.
    """
    if not config.directory:
        raise ConfigError("directory is empty: name the folder of the run, for example runs/my_run")
    if is_online(config):
        raise ConfigError("online.prompts is given, and rounds make their own preferences: use `sysdpo online`")
    if not config.data.source:
        raise ConfigError("data.source is empty: give a JSONL or Parquet file of preferences, or a data set of the hub")
    _check_files({"data.source": config.data.source, "evaluation.prompts": config.evaluation.prompts})
    own = config.evaluation
    if own.prompts:
        scorer = make_scorer(own.scorer, own.judge, "evaluation.")
        check_scorer(scorer, (*config.system.inputs, *config.system.nodes), "the system")
        return
    given = {"scorer": own.scorer, "judge": own.judge != JudgeConfig(), "ignore": own.ignore}
    names = [f"evaluation.{name}" for name, value in given.items() if value]
    if names:
        raise ConfigError(
            f"evaluation.prompts is empty: give the held-out prompts too, or leave {' and '.join(names)} out"
        )


def check_rounds(config: TrainConfig) -> None:
    """As `check_first`, for an online run."""
    if not config.directory:
        raise ConfigError("directory is empty: name the folder of the run, for example runs/my_run")
    if not is_online(config):
        raise ConfigError("online.prompts is empty: give the prompts that the rounds make runs of")
    if config.data.source:
        raise ConfigError(
            "data.source is given, and rounds make their own preferences: leave it out, or give --data.source ''"
        )
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts is empty: give held-out prompts, which say when the rounds should end")
    if config.dry_run:
        raise ConfigError("dry_run is of `sysdpo train`, which has its preferences: leave it out")
    _check_files({"online.prompts": config.online.prompts, "evaluation.prompts": config.evaluation.prompts})
    scorer = make_scorer(config.evaluation.scorer, config.evaluation.judge, "evaluation.")
    check_scorer(scorer, (*config.system.inputs, *config.system.nodes), "the system")
    known = (SCORE, *config.online.figures)
    for name in config.online.stop_on:
        if name not in known:
            raise ConfigError(f"online.stop_on {name!r} is no held-out figure: choose among {', '.join(known)}")


def _check_files(paths: Mapping[str, str]) -> None:
    for name, path in paths.items():
        if Path(path).suffix in (*LINES, *TABLE, ".txt") and not Path(path).exists():
            raise ConfigError(f"{name} {path} does not exist: give the file")
