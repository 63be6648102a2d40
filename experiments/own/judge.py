"""A judge behind HTTP: an endpoint that speaks OpenAI's chat completions."""

import base64
import http.client
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

# Not what a score is out of: "8/10", "8 out of 10". A sign that follows a digit is a dash: "between 3-4".
NUMBER = r"(?<![\d/])(?<!/ )(?<!out of )[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
# Worth another try, as all faults of the server are: timeout, conflict, too many requests.
TRANSIENT = (408, 409, 429)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, which would take the API key to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


@dataclass(frozen=True)
class Judge:
    """Scores a run by asking a model for a number.

    url: of the server, with or without /v1, to which chat/completions is added. model: its name there. template: the
    question, with the run's values in braces; values that are images are shown as images, in the order in which the
    template names them. number: regular expression of the score in the answer; the last match counts, of it the first
    group if there is one. key: name of the environment variable of the API key; none is sent where it is not set.
    timeout: seconds of one request. retries: after the first one, waiting `wait`, 2 `wait`, 4 `wait` ... seconds.
    """

    url: str
    model: str
    template: str
    number: str = NUMBER
    key: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the judge's url is {self.url!r}: begin it with http:// or https://")
        try:
            re.compile(self.number)
        except re.error as error:
            raise ConfigError(f"the judge's number {self.number!r} is no regular expression ({error})") from None
        if self.retries < 0 or self.timeout <= 0:
            raise ConfigError(
                f"the judge's retries {self.retries} or timeout {self.timeout:g} is below what can be done"
            )
        if not self._key.isascii() or not self._key.isprintable():
            raise ConfigError(f"the environment variable {self.key} holds characters that no API key has: set it again")
        if not self.fields:
            raise ConfigError(f"the judge's template names no value in braces: {self.template[:80]!r}")

    @property
    def fields(self) -> list[str]:
        """The names of the template."""
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise ConfigError(f"the judge's template is none ({error}): write braces as {{{{ and }}}}") from None
        if "" in names:
            raise ConfigError("the judge's template has {} without a name: name a value, or write {{ and }} for braces")
        return names

    @property
    def _key(self) -> str:
        return os.environ.get(self.key, "").strip()

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
        found = list(re.finditer(self.number, answer))
        if not found:
            raise ConfigError(f"the judge's answer has no number: {answer[:200]!r}; ask for one in the template")
        score = found[-1].group(1 if found[-1].re.groups else 0)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise ConfigError(
                f"the judge's number is {score!r}, found by {self.number!r}: mend the expression"
            ) from None

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        request, opener = urllib.request.Request(url, body, headers), urllib.request.build_opener(_NoRedirect)
        for attempt in range(self.retries + 1):
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                with error:
                    if error.code not in TRANSIENT and error.code < 500:
                        said = self._without_key(error.read(1000).decode(errors="replace"))[:200]
                        raise ConfigError(
                            f"the judge at {self.url} refuses: {reason} {said!r}; check url, model and key"
                        ) from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise ConfigError(
            f"the judge at {self.url} fails after {self.retries + 1} tries ({reason}): try later, scores are kept"
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key else text


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
