"""A judge behind HTTP: a model that is asked for the score of a run."""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge_answer import Form, text_of
from sysdpo_jax.evaluation.judge_client import Again, ChatClient
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.judge_template import Template, read_template
from sysdpo_jax.evaluation.unscored import ScoreError


def make_judge(config: JudgeConfig, field: str) -> "Judge":
    """The judge that is configured; its template is read. field: its place, for errors. Raises `ConfigError`."""
    if not config.url or not config.model or not config.template:
        raise ConfigError(f"{field}: a judge needs url, model and template")
    return Judge(
        template=read_template(config.template, f"{field}.template"),
        form=Form(config.answer, *config.range),
        client=ChatClient(
            config.url, os.environ.get(config.key, "").strip(), config.key, config.timeout, config.retries
        ),
        model=config.model,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )


@dataclass(frozen=True)
class Judge:
    """Scores a run by asking a model for a number.

    template: the question; values that are images are shown as images, in the order in which it names them. form: how
    the score is asked for and found. model, temperature, max_tokens: see `JudgeConfig`.
    """

    template: Template
    form: Form
    client: ChatClient
    model: str
    temperature: float | None = 0.0
    max_tokens: int | None = None

    async def score(self, connections: httpx.AsyncClient, run: Mapping[str, Any]) -> float:
        """The score of a run. connections: of the client.

        Raises `ScoreError` for an answer without a score, and `ConfigError` for a server that fails. Where the model
        samples its answers, a score that is not in the first one is looked for in another one.
        """
        return await self.client.ask(connections, self._question(run), self._read)

    def _question(self, run: Mapping[str, Any]) -> dict[str, Any]:
        images = [image for name in self.template.names for image in _images(run[name])]
        shown = {name: "(image)" if _images(value) else value for name, value in run.items()}
        text = self.template.filled(shown) + self.form.request
        content = [{"type": "text", "text": text}, *map(_as_part, images)] if images else text
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            **{name: value for name, value in settings.items() if value is not None},
        }

    def _read(self, completion: Any) -> float:
        try:
            return self.form.score(text_of(completion))
        except ScoreError as error:
            if self.temperature == 0:
                raise
            raise Again(str(error), final=error) from None


def _images(value: Any) -> list[np.ndarray]:
    """The images that a value is, or has in a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, np.ndarray) and item.ndim == 3]


def _as_part(image: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(ImageFiles.inside("", image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
