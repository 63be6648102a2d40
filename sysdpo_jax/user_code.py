"""Code that users give: tools, scorers, readers, factories, and the modules that hold them.

Configurations name it "module:name", as entry points of packages write it.
"""

import functools
import importlib
import logging
import os
import reprlib
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from inspect import Parameter, getfile, signature
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tenacity

from sysdpo_jax.errors import ConfigError, meant

logger = logging.getLogger(__name__)

# Where the frames between a command and the user's code lie: this library, and what tries again and waits for it.
CALLERS = tuple(f"{Path(getfile(module)).parent}{os.sep}" for module in (sys.modules[__name__], tenacity, futures))
# So many characters of a value, and of a message, are shown.
SHOWN = 60


@contextmanager
def user_code(
    what: str,
    failure: Callable[[str], Exception],
    expected: tuple[type[Exception], ...] = (),
    remedy: str = "fix it",
) -> Iterator[None]:
    """Around a call of the user's code: whatever it raises, `sys.exit` included, is a failure of that code.

    Only `KeyboardInterrupt` and other stops that are no `Exception` go through as they are: Ctrl-C, and what the
    commands and `Trainer.fit` make of SIGTERM.

    Args:
        what: Names the code and its place, for example "node 'price': the tool shop:price".
        failure: Class of what is raised instead, or a function that makes it; it takes a message.
        expected: Classes that the code is meant to raise, which go through as they are.
        remedy: What the user can do about it.

    Raises:
        failure: Names `what`, the class and the words of the exception, which is its cause and whose traceback is
            logged.
    """
    try:
        yield
    except expected:
        raise
    except (Exception, SystemExit, CancelledError) as error:
        logger.error("%s failed", what, exc_info=(type(error), error, _users(error.__traceback__)))
        raise failure(f"{what} failed ({said(error)}): {remedy}") from error


def _users(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame of the user's code on: what called it is none of their business."""
    first = trace
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(CALLERS):
        trace = trace.tb_next
    return first if trace is None else trace


def said(error: BaseException) -> str:
    """The class of an exception and its words."""
    return f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"


def name_of(code: Any) -> str:
    """A function or class as "module:name"; of an object that is called the class."""
    if isinstance(code, functools.partial):
        return name_of(code.func)
    own = code if hasattr(code, "__qualname__") else type(code)
    module = getattr(own, "__module__", None)
    return f"{module}:{own.__qualname__}" if module else str(own.__qualname__)


def is_users(code: Any) -> bool:
    """Whether a function, class or object is defined outside this library."""
    return name_of(code).split(":")[0].split(".")[0] != __name__.split(".")[0]


def shown(values: Mapping[str, Any]) -> str:
    """Named values for a message, each shortened: "question='why is ...', image=float32[64, 64, 3]"."""
    return ", ".join(f"{name}={_shortened(value)}" for name, value in values.items())


def _shortened(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    return short.repr(value)


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
