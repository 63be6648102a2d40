"""Which models are trained, frozen, or known by their recorded answers alone, as flags or a person say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sysdpo_jax.errors import ConfigError, meant

How = Literal["train", "frozen", "tool"]


@dataclass(frozen=True)
class Choice:
    """What becomes of a model's node. checkpoint: of what is computed here."""

    how: How
    checkpoint: str = ""


@dataclass(frozen=True)
class Flags:
    """What was given: names of nodes, and NAME=CHECKPOINT of nodes or of the models that the traces name."""

    train: Sequence[str] = ()
    frozen: Sequence[str] = ()
    tool: Sequence[str] = ()
    model: Sequence[str] = ()


def choose(
    models: Mapping[str, str], others: Sequence[str], flags: Flags, ask: Callable[[str], str] | None
) -> dict[str, Choice]:
    """The choice of each model's node.

    models: what the traces call the model of each node; others: the other nodes, which are tools. ask: puts a question
    to a person, if one is there; it is used where no flag is given.
    Raises `ConfigError` for names that are none, are given twice, or have no checkpoint, and where nothing is trained.
    """
    checkpoints = _checkpoints(models, flags.model)
    how: dict[str, How] = {}
    given: tuple[tuple[How, Sequence[str]], ...] = (
        ("train", flags.train),
        ("frozen", flags.frozen),
        ("tool", flags.tool),
    )
    for kind, names in given:
        for name in names:
            if name in others and kind == "tool":
                continue
            if name in others:
                raise ConfigError(f"--{kind} {name}: it is a tool, which has no model: leave it out")
            if name not in models:
                raise ConfigError(f"--{kind} {name!r} is no span of a model: {meant(name, models)}")
            if how.setdefault(name, kind) != kind:
                raise ConfigError(f"{name} is given to --{how[name]} and to --{kind}: give it once")
    if not how and not checkpoints and ask is not None:
        return _asked(models, ask)
    made: dict[str, Choice] = {}
    for name, recorded in models.items():
        checkpoint = checkpoints.get(name, checkpoints.get(recorded, ""))
        kind = how.get(name, "train" if checkpoint else "tool")
        if kind != "tool" and not (checkpoint or recorded):
            raise ConfigError(f"--{kind} {name}: the traces do not name its model: give --model {name}=CHECKPOINT")
        made[name] = Choice(kind, "" if kind == "tool" else checkpoint or recorded)
    if not any(choice.how == "train" for choice in made.values()):
        listed = " ".join(f"--model {name}=CHECKPOINT" for name in models)
        known = ", ".join(f"{name} (recorded as {model or 'no name'})" for name, model in models.items())
        raise ConfigError(f"nothing is trained: say which models are, of {known or 'none'}: {listed}")
    return made


def _checkpoints(models: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for word in given:
        name, equals, checkpoint = word.partition("=")
        if not equals or not checkpoint:
            raise ConfigError(f"--model {word!r}: write NAME=CHECKPOINT, for example draft=path/to/model")
        if name not in models and name not in models.values():
            raise ConfigError(f"--model {name!r} is no span of a model: {meant(name, [*models, *models.values()])}")
        made[name] = checkpoint
    return made


def _asked(models: Mapping[str, str], ask: Callable[[str], str]) -> dict[str, Choice]:
    made: dict[str, Choice] = {}
    for name, recorded in models.items():
        said = ask(
            f"{name} (recorded as {recorded or 'no name'}): the checkpoint to train, 'frozen CHECKPOINT', or nothing "
            "for its recorded answers alone: "
        ).strip()
        word, _, rest = said.partition(" ")
        if not said:
            made[name] = Choice("tool")
        elif word == "frozen" and rest.strip():
            made[name] = Choice("frozen", rest.strip())
        else:
            made[name] = Choice("train", said)
    if not any(choice.how == "train" for choice in made.values()):
        raise ConfigError("nothing is trained: name the checkpoint of at least one model")
    return made
