"""The error of what a user gave, which every part may raise."""


class ConfigError(ValueError):
    """A configuration or a file cannot be used: the message names the file, the field and the remedy."""
