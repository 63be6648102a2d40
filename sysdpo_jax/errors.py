"""Errors of what a user gave, and of files that this library wrote, which every part may raise."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class ConfigError(ValueError):
    """A configuration or a file cannot be used: the message names the file, the field and the remedy."""


class DamagedFileError(ValueError):
    """A file that this library wrote is no longer what it was: the message names it, the reason and the remedy."""


class ScoreError(ConfigError):
    """One run has no score, which says nothing of the others. reason: the kind of failure, for counts."""

    def __init__(self, message: str, reason: str = "the scorer failed"):
        super().__init__(message)
        self.reason = reason


def meant(name: Any, known: Iterable[str], other: str = "", form: Callable[..., str] = repr, cut: float = 0.6) -> str:
    """What a name that is not known may stand for, to end a message with: the nearest known one, or else all of them.

    other: what is said where none is near, instead. form: writes the nearest one. cut: how alike that must be, of 1.
    """
    every = list(known)
    near = get_close_matches(str(name), every, 1, cut)
    if near:
        return f"did you mean {form(near[0])}?"
    return other or f"there are {', '.join(every) or 'none'}"
