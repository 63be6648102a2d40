"""The question that a judge is asked: a file with the run's values in braces."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.evaluation.unscored import ScoreError
from sysdpo_jax.io import read_text
from sysdpo_jax.user_code import user_code


class Piece(NamedTuple):
    """A text and the field behind it: what stands in its braces, the value that it names, and its line."""

    text: str
    field: str | None
    name: str
    line: int


@dataclass(frozen=True)
class Template:
    """A text that `str.format` takes, and the place that it is from.

    Raises `ConfigError` naming the line where it is no such text, and for one that names no value.
    """

    path: str
    text: str

    def __post_init__(self) -> None:
        lines = self.text.split("\n")
        try:
            pieces = self.pieces
        except ValueError as error:
            line = next(n for n in range(1, len(lines) + 1) if not _parses("\n".join(lines[:n])))
            raise ConfigError(f"{self.path}, line {line}: {error}: write {{{{ and }}}} for braces") from None
        if not any(piece.field is not None for piece in pieces):
            raise ConfigError(f"{self.path} names no value of a run: write one in braces, such as {{answer}}")

    @property
    def pieces(self) -> list[Piece]:
        """The text in the order in which it stands there."""
        return list(_pieces(self.text))

    @property
    def names(self) -> list[str]:
        """The values that the text names."""
        return [piece.name for piece in self.pieces if piece.field is not None]

    def check(self, names: Collection[str], of: str) -> None:
        """Raise `ConfigError` for a field that names none of the values `names`. of: what has them, for the message."""
        for piece in self.pieces:
            if piece.field is not None and piece.name not in names:
                near = meant(piece.name, names, f"there are {', '.join(names)};", "{{{}}}".format)
                raise ConfigError(
                    f"{self.path}, line {piece.line}: {{{piece.field}}} is no value of {of}: {near} {{{{ and }}}} "
                    "stand for braces"
                )

    def filled(self, values: Mapping[str, Any]) -> str:
        """The text with the values. Raises `ScoreError` naming the line and the field that a value does not fit."""
        return "".join(piece.text + self._shown(piece, values) for piece in self.pieces)

    def _shown(self, piece: Piece, values: Mapping[str, Any]) -> str:
        if piece.field is None:
            return ""
        with user_code(f"{self.path}, line {piece.line}: {{{piece.field}}}", ScoreError):
            return f"{{{piece.field}}}".format(**values)


def read_template(path: str, field: str) -> Template:
    """The template in a file. field: that of the configuration. Raises `ConfigError` for a file that is none."""
    return Template(path, read_text(Path(path), f"{field} {path}", "give a file with the question"))


def _pieces(text: str) -> Iterator[Piece]:
    line = 1
    for before, name, specification, conversion in Formatter().parse(text):
        line += before.count("\n")
        if name is None:
            yield Piece(before, None, "", line)
            continue
        field = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
        yield Piece(before, field, re.split(r"[.\[]", name, maxsplit=1)[0], line)
        line += field.count("\n")


def _parses(text: str) -> bool:
    try:
        list(Formatter().parse(text))
    except ValueError:
        return False
    return True
