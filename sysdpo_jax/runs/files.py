"""The YAML files of runs: read strictly, written back, and packaged ones by name.

Paths in a file are relative to the file, those of flags to the working directory.
"""

import os
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import jax
import yaml

from sysdpo_jax.data.files import ROW_FILES
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.flags import from_mapping, read_flags, to_mapping, with_flags
from sysdpo_jax.io import read_text, write_whole
from sysdpo_jax.runs.config import TrainConfig

C = TypeVar("C", bound=TrainConfig)
RECIPES = Path(__file__).parents[1] / "recipes"
# What a run's folder says of it.
CONFIG, DATA = "config.yaml", "data.json"
# Fields that name files and folders, and those that do so or say "user" or "none".
FILES = ("directory", "init_from", "evaluation.prompts", "evaluation.judge.template", "online.prompts")
CACHES = ("compilation_cache", "prepared_cache")
# A text that begins so is a path, whether or not there is anything.
MARKS = ("./", "../", "/", "~")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the same name twice in a mapping, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def recipes() -> dict[str, Path]:
    """The packaged configurations by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def recipe_text(name: str) -> str:
    """A recipe with whole paths of the files that come with it. Raises `ConfigError` for a name that is none."""
    path = recipe(name)
    text = path.read_text(encoding="utf-8")
    values = yaml.load(text, _UniqueKeys)
    for given, whole in zip(jax.tree.leaves(values), jax.tree.leaves(_located(values, path.parent)), strict=True):
        text = text if given == whole else text.replace(f" {given}", f" {whole}")
    return text


def recipe(name: str) -> Path:
    """The file of a recipe. Raises `ConfigError` for a name that is none, with the nearest one."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"{name!r} is no recipe: {meant(name, known)}")
    return known[name]


def find_config(recipe_or_file: str) -> Path:
    """The file of a run: a path, or the name of a recipe.

    Raises:
        ConfigError: As `recipe`, for what is no path.
    """
    path = Path(recipe_or_file).expanduser()
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    return recipe(recipe_or_file)


def read_config(path: str | Path) -> TrainConfig:
    """A YAML file as a configuration, whose paths lead on from anywhere.

    Raises:
        ConfigError: Naming the file and the field, with the nearest known name.
    """
    path = Path(path)
    values = _parsed(path, read_text(path, str(path), "give the YAML file of the run"))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping of fields: begin with, for example, 'system:'")
    try:
        config = from_mapping(TrainConfig, _located(values, path.parent))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if path.name == CONFIG and (path.parent / DATA).is_file():
        # A run's own file: the run may have been moved since.
        return replace(config, directory=str(path.parent.absolute()))
    return config if config.directory else replace(config, directory=str(Path("runs", path.stem).absolute()))


def _parsed(path: Path, text: str) -> Any:
    """What the YAML of a file holds. Raises `ConfigError` with the line and the reason for what is none."""
    line: int | None = None
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else None
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        line, reason = text.count("\n", 0, error.position), f"the character {chr(error.character)!r}"
    except ValueError as error:
        # A date that there is not.
        reason = str(error)
    place = path if line is None else f"{path}:{line + 1}"
    raise ConfigError(f"{place}: this is no YAML ({reason}): fix it")


def configure(kind: type[C], arguments: Sequence[str]) -> C:
    """The configuration of the one file or recipe among the words, with the values of flags in place of its own.

    Args:
        kind: `TrainConfig`, or with further fields, which are flags alone.
        arguments: Of the command line.

    Raises:
        ConfigError: As `find_config`, `read_config` and `read_flags`, and for no file or several.
    """
    named, arguments = _named_by_flag(arguments)
    files, _ = read_flags(kind, arguments)
    files = [*named, *files]
    if len(files) != 1:
        said = f"{' and '.join(files)} are given" if files else "neither is given"
        raise ConfigError(f"give the file of one run, or the name of a recipe ({', '.join(recipes())}): {said}")
    config = kind(**vars(read_config(find_config(files[0]))))
    # The names of nodes and components are known now.
    _, flags = read_flags(config, arguments)
    return with_flags(
        config, [flag._replace(words=_located(flag.words, Path(), ".".join(flag.path))) for flag in flags]
    )


def _named_by_flag(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What --config names, the other way to give the file, which scripts are used to; and the other words."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(arguments)
    except ArgumentError:
        raise ConfigError("--config has no value: give the YAML file of the run behind it") from None
    return found.config, rest


def write_config(path: Path, config: TrainConfig) -> None:
    """Undo `read_config`; whole or not at all."""
    write_whole(path, yaml.safe_dump(to_mapping(config), sort_keys=False))


def _located(value: Any, base: Path, name: str = "") -> Any:
    """A value, or a mapping of values, with absolute paths in place of those that begin at `base`. name: dotted."""
    if isinstance(value, dict):
        return {key: _located(item, base, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_located(item, base, name) for item in value]
    return os.path.abspath(base / Path(value).expanduser()) if _is_path(value, base, name) else value


def _is_path(value: Any, base: Path, name: str) -> bool:
    if not isinstance(value, str) or not value:
        return False
    if name in FILES:
        return True
    if name in CACHES:
        return value not in ("user", "none")
    if name == "data.source" or fnmatch(name, "system.components.*.checkpoint"):
        # Other names are those of the hub.
        return value.startswith(MARKS) or Path(value).suffix in (*ROW_FILES, ".gguf") or (base / value).exists()
    if fnmatch(name, "system.nodes.*.tools"):
        return value.endswith(".json")
    return fnmatch(name, "system.components.*.settings.*") and value.startswith(MARKS)
