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
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from experiments.own.config import NUMBER, ConfigError, JudgeConfig
from sysdpo_jax.data.saving import ImageFiles

# Worth another try, as all faults of the server are: timeout, conflict, too many requests.
TRANSIENT = (408, 409, 429)
# Of one run: a question that is too long, or that the server's filter does not let through.
OF_THE_RUN = (400, 413, 422)


class ScoreError(ConfigError):
    """One run has no score, which says nothing of the others."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, which would take the API key to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


def make_judge(config: JudgeConfig, field: str) -> "Judge":
    """The judge that is configured; its template is read. field: its place, for errors. Raises `ConfigError`."""
    if not config.model or not config.template:
        raise ConfigError(f"{field}: a judge needs url, model and template")
    path = Path(config.template)
    if not path.is_file():
        raise ConfigError(f"{field}.template {config.template} does not exist: write the question into a file")
    try:
        template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}.template {path} is not UTF-8 text ({error.reason}): convert it") from None
    asked = {name: getattr(config, name) for name in ("url", "model", "number", "key", "temperature")}
    return Judge(template=template, timeout=config.timeout, retries=config.retries, **asked)


@dataclass(frozen=True)
class Judge:
    """Scores a run by asking a model for a number.

    url, model, number, key, temperature, timeout, retries: see `JudgeConfig`. template: the question, with the run's
    values in braces; values that are images are shown as images, in the order in which the template names them. No key
    is sent where its variable is not set. wait: seconds before the first retry, twice as many before each next one.
    """

    url: str
    model: str
    template: str
    number: str = NUMBER
    key: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
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
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [text, *map(_as_part, images)] if images else text["text"]}],
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        answer = self._ask(json.dumps(body).encode())
        found = list(re.finditer(self.number, answer))
        if not found:
            raise ScoreError(f"the judge's answer has no number: {answer[:200]!r}; ask for one in the template")
        score = found[-1].group(1 if found[-1].re.groups else 0)
        try:
            return _as_number(score)
        except (TypeError, AttributeError, ValueError):
            raise ScoreError(
                f"the judge's number is {score!r}, found by {self.number!r}: mend the expression"
            ) from None

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(_endpoint(self.url), body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        for attempt in range(self.retries + 1):
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                with error:
                    if error.code not in TRANSIENT and error.code < 500:
                        said = self._without_key(error.read(1000).decode(errors="replace"))[:200]
                        kind = ScoreError if error.code in OF_THE_RUN else ConfigError
                        raise kind(
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


def _endpoint(url: str) -> str:
    """Where questions go: below the address that OpenAI's client would be given."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    whole = path if path.endswith("/chat/completions") else f"{path or '/v1'}/chat/completions"
    return parts._replace(path=whole).geturl()


def _as_number(text: str) -> float:
    """Commas part thousands where they can, "1,000", and are decimal points elsewhere, "8,5"."""
    thousands = re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text)
    return float(text.replace(",", "" if thousands else "."))


def _content(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ScoreError(f"the judge's answer is no chat completion: {answer[:200]!r}") from None


def _images(value: Any) -> list[np.ndarray]:
    """The images that a value is, or has in a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, np.ndarray) and item.ndim == 3]


def _as_part(image: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(ImageFiles.inside("", image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
