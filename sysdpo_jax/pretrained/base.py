"""Reading configurations strictly: what changes the result is understood or refused by name, never guessed.

The fields of our configurations have the names of keys, and their type hints say which values these may have; keys.yaml
says it of other keys.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml

from sysdpo_jax.errors import meant

Model = TypeVar("Model")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: the message names the file, what is wrong and the remedy."""


REQUIRED: Any = object()

# How we compute and keep parameters; a checkpoint's configuration does not say.
OURS = ("dtype", "param_dtype", "remat", "attention")


class ClassKeys(NamedTuple):
    """What keys.yaml says of a class."""

    expects: Mapping[str, Sequence[Any]] = {}
    ignores: Sequence[str] = ()
    writes: Mapping[str, Any] = {}


_KEYS = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8"))
UNUSED: Sequence[str] = _KEYS["unused"]
NEUTRAL: Mapping[str, Sequence[Any]] = _KEYS["neutral"]
CLASSES = {name: ClassKeys(**keys) for name, keys in _KEYS["classes"].items()}
# What a type hint admits, for errors.
KINDS: dict[Any, str] = {
    int: "one whole number",
    float: "one number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    tuple[int, ...]: "a list of whole numbers",
    tuple[str, ...]: "a list of texts",
    tuple[int, int]: "two, height and width",
}


class ConfigReader:
    """One configuration file, key by key; `finish` refuses the keys that nobody asked for.

    values: the file's content. where: its name, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self.where = dict(values), where
        self._unread = {name for name in values if name not in _KEYS["common"]}

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The key's value, or `default` where it is absent. Raises `CheckpointError` when there is neither."""
        self._unread.discard(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            raise CheckpointError(f"{self.where} has no {name!r}: the file is incomplete or of another kind of model")
        return default

    def read(self, name: str, hint: Any, default: Any = REQUIRED) -> Any:
        """The key's value as a field with that type hint has it: tuples of lists, floats of whole numbers.

        A null is false, as in Python, where there is true or false. Raises `CheckpointError` for a value of another
        kind, such as a list with one for each block.
        """
        if get_origin(hint) is Literal:
            self.expect(name, *get_args(hint))
            return self.take(name, default)
        value = self.take(name, default)
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        for kind in kinds:
            if _fits(value, kind):
                return value if kind is NoneType else (get_origin(kind) or kind)(value)
        raise self.refused(name, f"only {' or '.join(KINDS[kind] for kind in kinds)}")

    def null_means(self, name: str, value: Any) -> None:
        """Take a null of the key for this value."""
        if name in self._values and self._values[name] is None:
            self._values[name] = value

    def refused(self, name: str, expected: str) -> CheckpointError:
        """The error for a key whose value the module here cannot have. expected: what it can."""
        return CheckpointError(f"{self.where}: {name}={_short(self._values.get(name))} is not supported, {expected}")

    def expect(self, name: str, *allowed: Any) -> None:
        """Raise `CheckpointError` unless the key is absent or has one of these values."""
        self._unread.discard(name)
        if name in self._values and self._values[name] not in allowed:
            raise CheckpointError(
                f"{self.where}: {name}={_short(self._values[name])} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); this model would be computed wrongly"
            )

    def expect_class(self, name: str) -> None:
        """`expect` what keys.yaml says of a class, and `ignore` what it ignores."""
        for key, values in CLASSES[name].expects.items():
            self.expect(key, *values)
        self.ignore(*CLASSES[name].ignores)

    def ignore(self, *names: str) -> None:
        """Mark keys that do not change what the model computes here."""
        self._unread.difference_update(names)

    def ignore_neutral(self) -> None:
        """Mark the keys still unread whose value is one of those that leave the model as it is without the key."""
        self.ignore(*(name for name in self._unread & set(NEUTRAL) if self._values[name] in NEUTRAL[name]))

    def finish(self) -> None:
        """Raise `CheckpointError` listing every key that was neither read nor ignored."""
        unread = [f"{name}={_short(self._values[name])}" for name in sorted(self._unread)]
        if unread:
            raise CheckpointError(
                f"{self.where} has keys that are not known here and may change the result: {', '.join(unread)}. Remove "
                "those that do not matter for this model, or add them to its family"
            )


def is_number(value: Any) -> bool:
    """A bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the kind that a type hint, no union, names."""
    if get_origin(kind) is tuple:
        member, more = get_args(kind)
        whole = isinstance(value, list | tuple) and (more is ... or len(value) == 2)
        return whole and all(_fits(each, member) for each in value)
    if kind is bool:
        return isinstance(value, bool | None)
    return is_number(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """For an error's one sentence: a list of a thousand betas is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def check_settings(kind: type, settings: Mapping[str, Any], made: Collection[str]) -> None:
    """Raise `TypeError` for settings that are no fields of the component. made: those that the checkpoint gives."""
    known = [field.name for field in fields(kind) if field.name not in made]
    for name in settings:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no setting {name!r} ({meant(name, known)})")


def read_fields(config: ConfigReader, kind: type, *names: str, **defaults: Any) -> dict[str, Any]:
    """Fields of a configuration from the keys of their names.

    Args:
        config: the file.
        kind: the dataclass.
        names: fields whose default is the dataclass' own, if it has one.
        defaults: other fields, with what they are where the file says nothing.

    Raises:
        CheckpointError: for a value of another kind than the field's, and for a missing key without a default.
    """
    known = {field.name: field for field in fields(kind)}
    own = {name: REQUIRED if known[name].default is MISSING else known[name].default for name in names}
    return {name: config.read(name, known[name].type, default) for name, default in (own | defaults).items()}


def read_model(config: ConfigReader, kind: type[Model], **values: Any) -> Model:
    """A configuration whose fields are the keys of the file, but for our own and those given here."""
    names = [field.name for field in fields(kind) if field.name not in (*OURS, *values)]  # type: ignore[arg-type]
    return build(config, kind, read_fields(config, kind, *names) | values)


def build(config: ConfigReader, kind: type[Model], values: Mapping[str, Any]) -> Model:
    """A configuration with these fields, once nothing in the file is left unread but switches that are off.

    Raises `CheckpointError` also for weights that are stored quantised, with what makes them readable.
    """
    config.ignore_neutral()
    for name in ("quantization_config", "compression_config"):
        stated = config.take(name, None)
        if stated is not None:
            method = stated.get("quant_method", "of no name") if isinstance(stated, dict) else stated
            raise CheckpointError(
                f"{config.where}: {name} says that the weights are quantised ({method}), which are not read: load the "
                "checkpoint that they were made from, or load this one with the library that wrote it and save what "
                "model.dequantize() gives"
            )
    config.finish()
    try:
        return kind(**values)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{config.where} describes no model: {error}") from None


def express(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a configuration dataclass as JSON has them, without our own and those left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*OURS, *left_out)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_ours(config: Model, other: Any) -> Model:
    """A configuration that was read from a file, with the fields that no file has taken from another one."""
    return replace(config, **{f.name: getattr(other, f.name) for f in fields(other) if f.name in OURS})  # type: ignore[type-var]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` when there is no such file or no object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give the folder that holds the checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
