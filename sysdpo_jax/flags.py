"""Frozen dataclasses from YAML files and from flags: every field is a flag, and what is wrong is said in one line.

Values are converted by jsonargparse, which also lays out the help and knows what shells complete.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sysdpo_jax.errors import ConfigError, meant

C = TypeVar("C")
# What a value of a type is, in words.
WORDS: dict[Any, str] = {
    PositiveInt: "a whole number of at least 1",
    NonNegativeInt: "a whole number of at least 0",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number of at least 0",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}
# Columns of a help.
WIDTH = 100


class Flag(NamedTuple):
    """A flag as `text`. path: the names that it leads through; kind: of the value; words: that follow it."""

    path: list[str]
    kind: Any
    words: list[str]
    text: str


class Field(NamedTuple):
    """A field that is a flag. name: dotted; default: MISSING where it must be given; help: a sentence."""

    name: str
    kind: Any
    default: Any
    help: str


def from_mapping(kind: type[C], values: Any, place: str = "") -> C:
    """The dataclass of a mapping, as a YAML file holds it.

    Args:
        kind: A dataclass whose fields are dataclasses, {name: dataclass}, or of types that jsonargparse knows.
        values: By name; fields that are left out have their defaults.
        place: Of the values in the whole, dotted, for errors.

    Raises:
        ConfigError: Naming the field, and the nearest known name or what its value should be.
    """
    hints = _hints(cast(Any, kind))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} is {values!r}: give a mapping of {', '.join(hints)}")
    for name in values:
        if name not in hints:
            raise ConfigError(f"{_below(place, name)} is no field: {meant(name, hints)}")
    made = {name: _converted(hints[name], value, _below(place, name)) for name, value in values.items()}
    _refuse_missing(kind, made, f"{place}." if place else "")
    return kind(**made)


def to_mapping(value: Any) -> Any:
    """Undo `from_mapping`: of what YAML and JSON hold alone."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_mapping(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_flags(config: Any, arguments: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """The words that belong to no flag, and the flags: --schedule.steps 200, --seeds 0 1, --dry-run, --name=value.

    Args:
        config: A dataclass, or an instance, whose {name: dataclass} then have no other names.
        arguments: Of the command line.

    Raises:
        ConfigError: For a flag that is no field, with the nearest one.
    """
    alone, flags, rest = list[str](), list[Flag](), list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            alone.append(word)
            continue
        flag, equals, value = word.removeprefix("--").partition("=")
        path, kind = _find(config, flag.split("."), f"--{flag}")
        words = [value] if equals else []
        if not equals and kind is bool:
            words = [rest.pop(0)] if rest[:1] in (["true"], ["false"]) else ["true"]
        elif not equals:
            number = next((place for place, other in enumerate(rest) if other.startswith("--")), len(rest))
            number = number if _is_tuple(kind) else min(number, 1)
            words, rest = rest[:number], rest[number:]
        if not words:
            raise ConfigError(f"--{flag} has no value: give {_expected(kind)} behind it")
        _add(flags, Flag(path, kind, words, f"--{flag}"))
    return alone, flags


def _add(flags: list[Flag], new: Flag) -> None:
    """Put a flag behind the others; the words of one that takes any number go behind those of the same before it."""
    several = any(get_args(each)[-1:] == (...,) for each in (new.kind, *get_args(new.kind)))
    for place, flag in enumerate(flags):
        words = [*flag.words, *new.words]
        # A list or null as YAML has it is the whole value.
        if several and flag.path == new.path and not any(word.startswith("[") or word == "null" for word in words):
            flags[place] = flag._replace(words=words)
            return
    flags.append(new)


def with_flags(config: C, flags: Sequence[Flag]) -> C:
    """The configuration with the values of flags in place of its own. Raises `ConfigError` as `from_mapping`."""
    for path, kind, words, text in flags:
        config = _replaced(config, path, _of_words(kind, words, text))
    return config


def parse_flags(config: type[C] | C, arguments: Sequence[str], positional: str = "") -> C:
    """The dataclass of flags alone, the other fields as in `config` or, of a type, by default.

    Args:
        config: A dataclass, or an instance.
        arguments: Of the command line.
        positional: The field that one word without a flag is the value of, all of them where it takes several.

    Raises:
        ConfigError: As `read_flags` and `from_mapping`, for a flag that must be given, and for any other word.
    """
    alone, flags = read_flags(config, arguments)
    if positional and alone:
        path, kind = _find(config, [positional], positional)
        words = alone if _is_tuple(kind) else alone[:1]
        alone = alone[len(words) :]
        flags.append(Flag(path, kind, words, positional))
    if alone:
        raise ConfigError(f"{alone[0]!r} belongs to no flag: write --name value")
    if not isinstance(config, type):
        return with_flags(config, flags)
    needed = [field.name for field in dataclasses.fields(cast(Any, config)) if _is_required(field)]
    given = {flag.path[0]: _of_words(*flag[1:]) for flag in flags if flag.path[0] in needed}
    _refuse_missing(config, given, "--")
    made: C = config(**given)
    return with_flags(made, [flag for flag in flags if flag.path[0] not in needed])


def fields_of(config: Any, prefix: str = "") -> Iterator[Field]:
    """All flags of a dataclass or, with its values as defaults, of an instance. Their help is that of its docstring."""
    kind = config if isinstance(config, type) else type(config)
    hints = _hints(cast(Any, kind))
    documented = [parse_docstring(each.__doc__ or "").params for each in reversed(kind.__mro__)]
    texts = {entry.arg_name: entry.description or "" for entries in documented for entry in entries}
    for field in dataclasses.fields(kind):
        default = field.default if isinstance(config, type) else getattr(config, field.name)
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name, item = f"{prefix}{field.name}", _item(hints[field.name])
        if dataclasses.is_dataclass(default):
            yield from fields_of(default, f"{name}.")
        elif dataclasses.is_dataclass(item):
            yield from fields_of(item, f"{name}.NAME.")
        else:
            text = " ".join(texts.get(field.name, "").split())
            yield Field(name, hints[field.name], default, text)


def help_parser(usage: str, description: str, fields: Sequence[Field], epilog: str = "") -> ArgumentParser:
    """What prints a command's help, and from what shells complete it."""
    layout = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=34)
    parser = ArgumentParser(
        usage=usage,
        description=description,
        epilog=epilog,
        add_help=False,
        formatter_class=layout,  # type: ignore[arg-type]
    )
    for field in fields:
        known = field.default not in (dataclasses.MISSING, "", None, (), {})
        text = f"{field.help} [{_shown(field.default)}]" if known else field.help
        named: dict[str, Any] = {"metavar": field.name.rpartition(".")[2].upper()}
        if get_origin(field.kind) is Literal:
            named = {"choices": get_args(field.kind)}
        elif field.kind is bool:
            # A flag alone is true.
            named = {"choices": ("true", "false")}
        flag, named["default"] = f"--{_dashed(field.name)}", argparse.SUPPRESS
        parser.add_argument(flag, help=text.replace("%", "%%"), **named)
    return parser


def _find(config: Any, path: Sequence[str], flag: str) -> tuple[list[str], Any]:
    """The names that a flag leads through and the type of the field there. config: a type or an instance."""
    names = list[str]()
    kind: Any = config if isinstance(config, type) else type(config)
    value: Any = None if isinstance(config, type) else config
    for place, part in enumerate(path):
        name, item = part.replace("-", "_"), _item(kind)
        if dataclasses.is_dataclass(kind):
            hints, here = _hints(cast(Any, kind)), kind if value is None else value
            if name not in hints:
                near = _meant_elsewhere(here, path[place:]) or _meant(part, hints, flag)
                raise ConfigError(f"{flag} is no flag: {near}")
            kind, value = hints[name], None if value is None else getattr(value, name)
        elif Any in (kind, item):
            # Keyword arguments.
            kind = Any
        elif item is not None:
            # Names of the user's own, of which a field of one that there is not cannot be given.
            name, last = part, place == len(path) - 1
            if dataclasses.is_dataclass(item) and value is not None and name not in value and not last:
                raise ConfigError(f"{flag} is no flag: {_meant(name, value, flag)}")
            kind, value = item, None if value is None else value.get(name)
        else:
            raise ConfigError(f"{flag} is no flag: what it begins with has no fields")
        kind = type(value) if dataclasses.is_dataclass(value) else kind
        names.append(name)
    return names, kind


def _replaced(given: Any, path: Sequence[str], value: Any) -> Any:
    """The dataclass or mapping with another value where the path leads."""
    name, *rest = path
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return dataclasses.replace(given, **{name: _replaced(getattr(given, name), rest, value) if rest else value})
    known = given if isinstance(given, Mapping) else {}
    return {**known, name: _replaced(known.get(name), rest, value) if rest else value}


def _converted(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, place)
    item = _item(kind)
    if kind is Any:
        return value
    if item is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} is {value!r}: give a mapping of names to values")
        return {str(name): _converted(item, each, _below(place, name)) for name, each in value.items()}
    if value is None and type(None) not in get_args(kind):
        raise ConfigError(f"{place} is null: give {_expected(kind)}")
    try:
        made = _leaf_parser(kind).parse_object({"value": value}).value
    except (ArgumentError, TypeError, ValueError):
        raise ConfigError(f"{place} is {value!r}: give {_expected(kind)}") from None
    # Numbers with bounds are of classes of their own, which YAML and JSON do not know.
    if isinstance(made, int | float) and not isinstance(made, bool):
        return int(made) if isinstance(made, int) else float(made)
    return made


@cache
def _leaf_parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _of_words(kind: Any, words: Sequence[str], flag: str) -> Any:
    """The value that follows a flag."""
    [*_, last] = words
    if _is_tuple(kind) and not last.startswith("[") and list(words) != ["null"]:
        return _converted(kind, list(words), flag)
    if kind is Any or _is_tuple(kind) or dataclasses.is_dataclass(kind) or _item(kind) is not None:
        try:
            return _converted(kind, yaml.safe_load(last), flag)
        except yaml.YAMLError:
            raise ConfigError(f"{flag} is {last!r}, which is no YAML: give {_expected(kind)}") from None
    return _converted(kind, last, flag)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with the bounds that annotations hold."""
    return {name: _bounded(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _bounded(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_bounded, get_args(hint)))]  # noqa: UP007
    return hint


def _item(kind: Any) -> Any:
    """What a dict type holds, None for another type."""
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _is_tuple(kind: Any) -> bool:
    return any(get_origin(each) is tuple for each in (kind, *get_args(kind)))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _refuse_missing(kind: type, given: Mapping[str, Any], prefix: str) -> None:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)
    missing = [f"{prefix}{field.name}" for field in fields if _is_required(field) and field.name not in given]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given: see --help")


def _below(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)


def _meant_elsewhere(config: Any, path: Sequence[str]) -> str:
    """The flags that are called so in a group that was not named, in words: --schedule.steps for --steps."""
    last, names = path[-1].replace("-", "_"), [field.name for field in fields_of(config)]
    found = [name for name in names if "." in name and name.rpartition(".")[2] == last and "NAME" not in name]
    if not found and len(path) > 1:
        found = [
            f"{group}{'.'.join(path)}"
            for group in {n.partition(f"{path[0]}.")[0] for n in names if f".{path[0]}." in n}
        ]
    return f"did you mean {' or '.join(repr(f'--{_dashed(name)}') for name in found[:3])}?" if found else ""


def _meant(name: str, known: Iterable[str], flag: str) -> str:
    """`meant`, of a name in a flag, which is given back whole."""
    return meant(name, known, form=lambda near: repr(flag.replace(name, _dashed(near), 1)))


def _dashed(name: Any) -> str:
    return str(name).replace("_", "-")


def _expected(kind: Any) -> str:
    """The values of a type, in words."""
    if kind in WORDS:
        return WORDS[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_expected, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"a list, each {_expected(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)} values, {', '.join(map(_expected, inner))}"
    return "a mapping" if origin is dict or dataclasses.is_dataclass(kind) else "a value"


def _shown(value: Any) -> str:
    """A default, as a flag has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
