"""Runs without a score: the error that says why, and how many there are of each kind."""

from collections import Counter
from collections.abc import Iterable

from sysdpo_jax.errors import ConfigError


class ScoreError(ConfigError):
    """One run has no score, which says nothing of the others. reason: the kind of failure, for counts."""

    def __init__(self, message: str, reason: str = "the scorer failed"):
        super().__init__(message)
        self.reason = reason


def counted(errors: Iterable[ScoreError]) -> str:
    """How many failures there are of each kind, the most frequent first: "the answer was cut: 5, ...: 1"."""
    kinds = Counter(error.reason for error in errors)
    return ", ".join(f"{reason}: {number}" for reason, number in kinds.most_common())
