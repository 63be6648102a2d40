"""Fields of configurations that are read and written alike."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader

Model = TypeVar("Model")
# How we compute and keep parameters; a checkpoint's configuration does not say.
OURS = ("dtype", "param_dtype", "remat")


def whole(config: ConfigReader, name: str, default: Any) -> int:
    """A whole number. Raises `CheckpointError` for anything else, such as a list with one for each block."""
    value = config.take(name, default)
    if type(value) is not int:
        raise CheckpointError(f"{config.where}: {name}={value!r} is not supported, only one whole number")
    return value


def whole_or_each(config: ConfigReader, name: str, default: Any) -> int | tuple[int, ...]:
    """A whole number or a tuple of them. Raises `CheckpointError` for anything else, such as a list of lists."""
    value = config.take(name, default)
    if type(value) is int:
        return value
    if not isinstance(value, list | tuple) or not all(type(member) is int for member in value):
        raise CheckpointError(
            f"{config.where}: {name}={value!r} is not supported, only a whole number or a list with one for each block"
        )
    return tuple(value)


def build(config: ConfigReader, kind: type[Model], values: Mapping[str, Any]) -> Model:
    """A configuration with these fields, once nothing in the file is left unread."""
    config.finish()
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{config.where} describes no model: {error}") from None


def express(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a configuration dataclass as JSON has them, without our own and those left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*OURS, *left_out)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
