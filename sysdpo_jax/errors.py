"""Errors of what a user gave, and of files that this library wrote, which every part may raise."""


class ConfigError(ValueError):
    """A configuration or a file cannot be used: the message names the file, the field and the remedy."""


class DamagedFileError(ValueError):
    """A file that this library wrote is no longer what it was: the message names it, the reason and the remedy."""


class ScoreError(ConfigError):
    """One run has no score, which says nothing of the others. reason: the kind of failure, for counts."""

    def __init__(self, message: str, reason: str = "the scorer failed"):
        super().__init__(message)
        self.reason = reason
