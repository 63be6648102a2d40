"""Calls of code that users give: tools, scorers, readers, factories, and the modules that hold them."""

import functools
import logging
import os
import reprlib
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from inspect import getfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tenacity

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
