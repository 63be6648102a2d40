"""Files that grow by whole lines, each made in one way: the same command goes on, another one is refused."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import write_whole


@dataclass(frozen=True)
class ResumableJsonl:
    """JSON Lines at `path`, with `about`, how they are made, in `<path>.json` beside them.

    Raises `ConfigError` where the file is there and was made in another way, naming what differs.
    """

    path: Path
    about: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} exists, and nothing says how it was made: name another output") from None
        differing = sorted(name for name in {*self.about, *noted} if noted.get(name) != self.about.get(name))
        if differing:
            raise ConfigError(
                f"{self.path} was made with another {', '.join(differing)} (see {self.note}): name another output"
            )

    @property
    def note(self) -> Path:
        """Says how the file is made."""
        return note_of(self.path)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add whole lines, on disk when this returns."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.note, json.dumps(self.about, indent=1) + "\n")
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # A full disk took a part of them.
            os.truncate(self.path, before)
            raise

    def count(self) -> int:
        """The whole lines; a killed process may have left a part of another."""
        return len(self._ends()) - 1

    def cut(self, number: int) -> None:
        """Drop what follows the first `number` lines."""
        if self.path.exists():
            os.truncate(self.path, self._ends()[number])

    def _ends(self) -> list[int]:
        """Where the first 0, 1, 2 ... whole lines end, in bytes."""
        ends = [0]
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        ends.append(ends[-1] + len(line))
        return ends


def note_of(path: Path) -> Path:
    """Where it is said how the file at `path` was made."""
    return path.with_name(f"{path.name}.json")
