"""The entry of `sysdpo`: which command, its flags, and how its process ends."""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import shtab
from jsonargparse import ArgumentParser

import sysdpo_jax as sj
from sysdpo_jax.cli import ARGUMENTS
from sysdpo_jax.cli.ending import bounded_exit, user_errors
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.flags import fields_of, help_parser, parse_flags
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import configure

# Each is the module of its name beside this one, but for names that Python has taken.
MODULES = {"import": "import_traces"}
COMMANDS = {
    "import": "propose a system and its preferences from traces of a program",
    "train": "align a system from preferences",
    "online": "align a system in rounds, on preferences between its own runs",
    "rollout": "sample whole runs of a system on prompts",
    "score": "score runs, with a function of your own or a judge",
    "pairs": "turn scored runs into preferences",
    "annotate": "ask people which of two runs is better, on a local page",
    "prepare": "read, check and encode a run's preferences before it trains",
    "export": "write the aligned models, each with a model card",
    "report": "write a run's report.html again",
    "compile": "compile a run's step for TPUs that are not there: does it fit?",
    "recipes": "list the packaged configurations, or print one",
}
# Several processes may share their work.
SHARED = ("train", "online", "rollout", "prepare")
EXAMPLE = "example:\n  sysdpo train quickstart --dry-run"
HELP, HELP_ALL, COMPLETION = ("-h", "--help"), "--help.all", "--print_completion"


def main() -> None:
    """Run the command of the process's arguments."""
    with bounded_exit():
        arguments = sys.argv[1:]
        if arguments[:1] and arguments[0] in SHARED and not {*HELP, HELP_ALL} & {*arguments}:
            sj.initialize()
        dispatch(arguments)


def dispatch(arguments: Sequence[str]) -> None:
    """Run a command in this process. Raises SystemExit where `user_errors` ends it, and after a help."""
    with user_errors():
        name, *rest = arguments or ["--help"]
        if name in HELP:
            _parser().print_help()
        elif name == "--version":
            print(sj.__version__)
        elif name == COMPLETION:
            print(_completion(rest))
        elif name not in COMMANDS:
            raise ConfigError(f"{name!r} is no command: {meant(name, COMMANDS)}")
        else:
            ARGUMENTS.set(tuple(arguments))
            _run(command_module(name), name, rest)


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"sysdpo_jax.cli.{MODULES.get(name, name)}")


def _run(command: ModuleType, name: str, arguments: Sequence[str]) -> None:
    for every in (HELP_ALL, *HELP):
        if every in arguments:
            _command_parser(command, name, every == HELP_ALL).print_help()
            return
    if issubclass(command.Config, TrainConfig):
        command.run(configure(command.Config, arguments))
    else:
        command.run(parse_flags(command.Config, arguments, getattr(command, "POSITIONAL", "")))


def _command_parser(command: ModuleType, name: str, every: bool) -> ArgumentParser:
    """The command's help: of all its flags, or of those that are used most where it says which (`SHOWN`)."""
    configured, shown = issubclass(command.Config, TrainConfig), {each.name: each for each in fields_of(command.Config)}
    description, _, details = (command.__doc__ or "").partition("\n\n")
    if hasattr(command, "SHOWN") and not every:
        shown = {name: shown[name] for name in command.SHOWN}
        details += f"\nEvery field of the file is a flag: sysdpo {name} {HELP_ALL} lists them.\n"
    word = "RECIPE_OR_FILE (or --config FILE)" if configured else getattr(command, "POSITIONAL", "").upper()
    usage = " ".join(filter(None, ("sysdpo", name, word, "[--FLAG VALUE ...]")))
    return help_parser(usage, description, list(shown.values()), details.strip("\n"))


def _parser() -> ArgumentParser:
    listed = "\n".join(f"  {name:<9} {summary}" for name, summary in COMMANDS.items())
    about = f"Align compound AI systems from preferences.\n\ncommands:\n{listed}"
    options = f"sysdpo COMMAND --help: its flags\nsysdpo {COMPLETION} {{bash,zsh}}: completion for a shell"
    return help_parser("sysdpo COMMAND [--FLAG VALUE ...]", about, [], f"{options}\n\n{EXAMPLE}")


def _completion(arguments: Sequence[str]) -> str:
    """The script with which a shell completes commands and their flags."""
    shells = ("bash", "zsh")
    if len(arguments) != 1 or arguments[0] not in shells:
        raise ConfigError(f"{COMPLETION}: give {' or '.join(shells)}")
    whole = ArgumentParser(prog="sysdpo")
    commands = whole.add_subcommands()
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, _command_parser(command_module(name), name, True), help=summary)
    script: str = shtab.complete(whole, arguments[0])
    return script
