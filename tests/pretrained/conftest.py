"""Fixtures of the tests that read and write checkpoints."""

import logging
from collections.abc import Iterator

import pytest


class Messages(logging.Handler):
    """Keeps what is logged as plain strings."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


@pytest.fixture
def library_log() -> Iterator[list[str]]:
    """What transformers and diffusers log from warnings upwards, whether or not their loggers tell the root logger."""
    handler = Messages()
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler.kept
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
