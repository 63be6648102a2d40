"""A judge behind HTTP: an endpoint that speaks OpenAI's chat completions."""

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np

from experiments.own.config import ConfigError
from sysdpo_jax.data.saving import ImageFiles

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
# Worth another try: too many requests, or a fault of the server.
TRANSIENT = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Judge:
    """Scores a run by asking a model: the last number of its answer.

    url: of the server, to which /v1/chat/completions is added. model: its name there. template: the question, with the
    run's values in braces; values that are images are shown as images, in the order in which the template names them.
    key: name of the environment variable that holds the API key; none is sent where it is not set.
    timeout: seconds of one request. retries: after the first one, waiting `wait`, 2 `wait`, 4 `wait` ... seconds.
    """

    url: str
    model: str
    template: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError(f"the judge's template names no value in braces: {self.template[:80]!r}")

    @property
    def fields(self) -> list[str]:
        """The names of the template."""
        try:
            return [name for _, name, _, _ in Formatter().parse(self.template) if name]
        except ValueError as error:
            raise ConfigError(f"the judge's template is none ({error}): write braces as {{{{ and }}}}") from None

    def __call__(self, run: Mapping[str, Any]) -> float:
        """Raises `ConfigError` for a value that the run lacks, an answer without a number, and a server that fails."""
        missing = [name for name in self.fields if name not in run]
        if missing:
            raise ConfigError(f"the judge's template names {missing[0]!r}; a run has {', '.join(run)}")
        images = [image for name in self.fields for image in _images(run[name])]
        shown = {name: "(image)" if _images(run[name]) else run[name] for name in self.fields}
        text = {"type": "text", "text": self.template.format(**shown)}
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": [text, *map(_as_part, images)] if images else text["text"]}],
        }
        answer = self._ask(json.dumps(body).encode())
        numbers = NUMBER.findall(answer)
        if not numbers:
            raise ConfigError(f"the judge's answer has no number: {answer[:200]!r}; ask for one in the template")
        return float(numbers[-1])

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {os.environ[self.key]}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/v1/chat/completions", body, headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in TRANSIENT:
                    raise ConfigError(f"the judge at {self.url} refuses: {reason}; check url, model and key") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error))
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise ConfigError(
            f"the judge at {self.url} fails after {self.retries + 1} tries ({reason}): try later, scores are kept"
        )


def _content(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(f"the judge's answer is no chat completion: {answer[:200]!r}") from None


def _images(value: Any) -> list[np.ndarray]:
    """The images that a value is, or has in a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, np.ndarray) and item.ndim == 3]


def _as_part(image: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(ImageFiles.inside("", image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
