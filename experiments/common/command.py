"""The command line of an experiment: flags, presets, tables of settings, a folder of one configuration."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sysdpo_jax.flags import fields_of, from_mapping, help_parser, parse_flags
from sysdpo_jax.io import InUseError, locked_folder, read_json, write_json
from sysdpo_jax.manifest import check_same
from sysdpo_jax.runs import keep_compilations

C = TypeVar("C")


def read_table(path: Path, section: str, kind: type[C]) -> dict[str, C]:
    """{name: dataclass} of a section of a YAML file."""
    return {
        name: from_mapping(kind, fields)
        for name, fields in yaml.safe_load(path.read_text(encoding="utf-8"))[section].items()
    }


def read_presets(full: C, path: Path) -> dict[str, C]:
    """The full size, and the presets of a YAML file's section of that name, {preset: {flag without dashes: value}}."""
    presets = {"full": full}
    for name, flags in yaml.safe_load(path.read_text(encoding="utf-8"))["presets"].items():
        words = {flag: value if isinstance(value, str) else json.dumps(value) for flag, value in flags.items()}
        presets[name] = parse_flags(full, [f"--preset={name}", *(f"--{flag}={word}" for flag, word in words.items())])
    return presets


def parse(default: C, arguments: Sequence[str], description: str | None) -> C:
    """The configuration with any flag's value in place of its own. Raises SystemExit after --help, and for no flag."""
    usage, _, about = (description or "").partition("\n\n")
    if {"-h", "--help"} & {*arguments}:
        help_parser("python -m MODULE [--FLAG VALUE ...]", usage, list(fields_of(default)), about).print_help()
        raise SystemExit(0)
    try:
        return parse_flags(default, arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def parse_preset(presets: Mapping[str, C], arguments: Sequence[str], description: str | None) -> C:
    """As `parse`, with the values of the preset that --preset names, of the first one without it."""
    words = [word for each in arguments for word in each.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else next(iter(presets))
    if name not in presets:
        raise SystemExit(f"error: --preset is {name!r}: give {' or '.join(presets)}")
    return parse(presets[name], arguments, description)


def made_by(
    module: str, arguments: Sequence[str], packages: Sequence[str] = (), cores: object = os.cpu_count(), note: str = ""
) -> dict[str, Any]:
    """What a file of results says of the command that made it. packages: whose versions count; "python" is one too."""
    versions = {name: platform.python_version() if name == "python" else version(name) for name in packages}
    return {
        "command": " ".join([f"python -m {module}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {cores} cores{note}",
        **({"versions": versions} if versions else {}),
    }


@contextmanager
def experiment_folder(folder: Path, run: Any) -> Iterator[None]:
    """The folder belongs to one configuration, a dataclass: phases of another must not be taken for this one's.

    For the block it is this process's alone. Compilations are kept in it too: methods, seeds and starts compile the
    same steps. Raises SystemExit.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except InUseError as error:
            raise SystemExit(f"error: {error}") from None
        path = folder / "config.json"
        if path.exists():
            noted = read_json(path)
            check_same(str(path), noted, dataclasses.asdict(run), "choose another --folder", SystemExit)
        write_json(path, dataclasses.asdict(run))
        keep_compilations(str(folder / "compiled"))
        yield
