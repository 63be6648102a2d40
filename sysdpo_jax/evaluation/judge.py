"""A judge behind HTTP: a model that is asked for the score of a run, by a file with the run's values in braces."""

import base64
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import httpx
import numpy as np

from sysdpo_jax.components.images import as_png
from sysdpo_jax.endpoint import Again, Endpoint, RefusedError
from sysdpo_jax.errors import ConfigError, ScoreError, meant
from sysdpo_jax.evaluation.judge_answer import Form, text_of
from sysdpo_jax.evaluation.judge_config import JudgeConfig
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
        pieces, line = list[Piece](), 1
        for before, name, specification, conversion in Formatter().parse(self.text):
            line += before.count("\n")
            if name is None:
                pieces.append(Piece(before, None, "", line))
                continue
            field = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            pieces.append(Piece(before, field, re.split(r"[.\[]", name, maxsplit=1)[0], line))
            line += field.count("\n")
        return pieces

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


def _parses(text: str) -> bool:
    try:
        list(Formatter().parse(text))
    except ValueError:
        return False
    return True


def make_judge(config: JudgeConfig, field: str) -> "Judge":
    """The judge that is configured; its template is read. field: its place, for errors. Raises `ConfigError`."""
    if not config.url or not config.model or not config.template:
        raise ConfigError(f"{field}: a judge needs url, model and template")
    client = Endpoint("the judge", "judge.", config.url, config.key, config.timeout, config.retries)
    template = read_template(config.template, f"{field}.template")
    return Judge(config, template, Form(config.answer, *config.range), client)


@dataclass(frozen=True)
class Judge:
    """Scores a run by asking a model for a number.

    template: the question; values that are images are shown as images, in the order in which it names them. form: how
    the score is asked for and found.
    """

    config: JudgeConfig
    template: Template
    form: Form
    client: Endpoint

    async def score(self, connections: httpx.AsyncClient, run: Mapping[str, Any]) -> float:
        """The score of a run. connections: of the client.

        Raises `ScoreError` for an answer without a score, and `ConfigError` for a server that fails. Where the model
        samples its answers, a score that is not in the first one is looked for in another one.
        """
        url = self.client.below("/chat/completions")
        try:
            return await self.client.ask(connections, url, self._question(run), self._read)
        except RefusedError as error:
            raise ScoreError(str(error), error.reason) from None

    def _question(self, run: Mapping[str, Any]) -> dict[str, Any]:
        # Of a node that did not run there is nothing to show.
        run = {**dict.fromkeys(self.template.names, ""), **run}
        images = [image for name in self.template.names for image in _images(run[name])]
        shown = {name: "(image)" if _images(value) else value for name, value in run.items()}
        text = self.template.filled(shown) + self.form.request
        content = [{"type": "text", "text": text}, *map(_as_part, images)] if images else text
        settings = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            **{name: value for name, value in settings.items() if value is not None},
        }

    def _read(self, completion: Any) -> float:
        try:
            return self.form.score(text_of(completion))
        except ScoreError as error:
            if self.config.temperature == 0:
                raise
            raise Again(str(error), final=error) from None


def _images(value: Any) -> list[np.ndarray]:
    """The images that a value is, or has in a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, np.ndarray) and item.ndim == 3]


def _as_part(image: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(as_png(image, "")).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
