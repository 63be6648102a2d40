"""Answers of remote models on disk, each by the request that it was paid for, and what they cost together."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sysdpo_jax.errors import ConfigError

# Seconds that one process waits for another that writes.
WAIT = 60.0
TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (model TEXT PRIMARY KEY, calls INTEGER NOT NULL, tokens INTEGER NOT NULL)",
)
SPEND = """
INSERT INTO spent VALUES (?, 1, ?)
ON CONFLICT (model) DO UPDATE SET calls = calls + 1, tokens = tokens + excluded.tokens
"""


class CacheError(ConfigError):
    """The answers that are kept cannot be read, or none can be kept: says where, why and what to do."""


class Spent(NamedTuple):
    """What a model's answers in a cache cost: requests that were answered, and tokens that the server counted."""

    calls: int
    tokens: int


@dataclass(frozen=True)
class RemoteCache:
    """A file that several processes may read and write at a time."""

    path: Path

    def find(self, request: str) -> Any:
        """The answer to a request, None where there is none. request: see `request_id`."""
        with self._open() as file:
            row = file.execute("SELECT answer FROM answers WHERE request = ?", (request,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, request: str, model: str, answer: Any, tokens: int) -> None:
        """Write an answer and what it cost; both are on disk then. Of a request's answers the first stays."""
        with self._open() as file, file:
            row = (request, model, json.dumps(answer))
            if file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row).rowcount:
                file.execute(SPEND, (model, tokens))

    def spent(self, model: str) -> Spent:
        """What all answers of a model cost."""
        with self._open() as file:
            row = file.execute("SELECT calls, tokens FROM spent WHERE model = ?", (model,)).fetchone()
        return Spent(0, 0) if row is None else Spent(*row)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                # What was asked may be private: the file is its owner's from the beginning.
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            with closing(sqlite3.connect(self.path, timeout=WAIT)) as file:
                for table in TABLES:
                    file.execute(table)
                yield file
        except (OSError, sqlite3.OperationalError) as error:
            raise CacheError(
                f"the answers of remote models cannot be kept in {self.path} ({error}): make room and give leave to "
                "write there, or name another file as cache"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CacheError(
                f"the answers of remote models in {self.path} are damaged ({error}): move the file away, or name "
                "another one as cache"
            ) from error


def request_id(url: str, body: Mapping[str, Any], draw: int) -> str:
    """What a request is known by. url: without anything secret. draw: tells samples of equal requests apart."""
    text = json.dumps([url, body, draw], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
