"""Python objects named in a configuration: "module:name", as entry points of packages write it."""

import importlib
import sys
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.user_code import is_users, shown, user_code


def import_object(path: str, field: str) -> Any:
    """What "module:name" names; modules in the working directory are found. field: its place, for errors.

    Raises `ConfigError` where there is no such module or name, or its import fails.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{field} is {path!r}: write module:name, for example my_package.tools:split_lines")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    cannot = f"{field}: the module {module!r} cannot be imported"
    try:
        with user_code(f"{cannot}: it", ConfigError, (ModuleNotFoundError,)):
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{cannot} ({error}): check its name, or install what it needs") from None
    for part in name.split("."):
        with user_code(f"{field}: {path}", ConfigError):
            # A module may make its attributes when they are asked for.
            there, known = hasattr(found, part), dir(found)
            found = getattr(found, part, None)
        if not there:
            near = meant(part, known, "write module:name of something that it defines")
            raise ConfigError(f"{field}: {module} has no {name!r}: {near}")
    return found


def import_function(path: str, field: str) -> Callable[..., Any]:
    """The function, or another thing that can be called, that "module:name" names. Raises as `import_object`."""
    found = import_object(path, field)
    if not callable(found):
        raise ConfigError(f"{field}: {path} is {shown({'it': found})}, which cannot be called: name a function")
    function: Callable[..., Any] = found
    return function


def built(value: Any, field: str) -> Any:
    """The value with every mapping {call: "module:name", ...} in it replaced by what that call returns.

    Raises `ConfigError` where the call refuses its arguments.
    """
    if isinstance(value, list | tuple):
        return tuple(built(item, f"{field}.{place}") for place, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    inner = {name: built(item, f"{field}.{name}") for name, item in value.items() if name != "call"}
    if "call" not in value:
        return inner
    return call(value["call"], inner, field, f"{field}.call")


def call(path: str, settings: Mapping[str, Any], field: str, name_field: str) -> Any:
    """What the function or class "module:name" returns for the settings, whose place is `field`.

    Raises `ConfigError` for a setting that it does not take, with the nearest one, one that it needs and lacks, and
    values that it refuses.
    """
    function = import_function(path, name_field)
    try:
        known = signature(function).parameters
    except (TypeError, ValueError):
        raise ConfigError(f"{name_field}: nothing says what {path} takes: write a function around it") from None
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        for name in settings:
            if name not in known:
                raise ConfigError(f"{field}.{name} is no setting of {path}: {meant(name, known)}")
    try:
        signature(function).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"{field}: {path} cannot be called ({error})") from None
    try:
        # A component of the library says with a ValueError what is wrong with its settings.
        with user_code(f"{field}: {path}", ConfigError, (ConfigError,) if is_users(function) else (ValueError,)):
            return function(**settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}: {path} refuses its settings: {error}") from error
