"""A server of language models: many questions at a time, and the few requests by which it gets parameters."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tenacity

from sysdpo_jax.errors import meant
from sysdpo_jax.serving.engines import ENGINES, AnswerError, Completion, Engine, Question, Request
from sysdpo_jax.threads import DaemonExecutor

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
TRANSIENT = (408, 409, 425, 429)


class ServingError(ValueError):
    """A server cannot be used: the message names it, the reason and the remedy."""


class _Again(Exception):
    pass


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    engine: str = "vllm"
    key: str = "SERVER_API_KEY"
    parallel: int = 64
    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ServingError(f"the engine {self.engine!r} is not known: {meant(self.engine, ENGINES)}")

    @property
    def shown(self) -> str:
        return f"the server at {self.url}"

    def ask(self, model: str, prompts: Sequence[tuple[list[int], int]], question: Question) -> list[Completion]:
        pool = DaemonExecutor(min(self.parallel, len(prompts)), "serving")
        try:
            asked = [pool.submit(self._post, self._own.completion(model, p, s, question)) for p, s in prompts]
            return [self._own.read(each.result()) for each in asked]
        except AnswerError as error:
            raise ServingError(f"{self.shown}: {error}") from None
        finally:
            pool.shutdown(wait=False)

    def load_adapter(self, name: str, folder: Path) -> None:
        self._post(self._own.load_adapter(name, str(folder)))

    def unload_adapter(self, name: str) -> None:
        self._post(self._own.unload_adapter(name))

    def load_weights(self, name: str, folder: Path) -> None:
        for request in self._own.load_weights(name, str(folder)):
            self._post(request)

    @property
    def _own(self) -> Engine:
        return ENGINES[self.engine]

    def _post(self, request: Request) -> Any:
        path, body = request
        key = os.environ.get(self.key, "")

        def once() -> Any:
            try:
                answer = httpx.post(self.url + path, json=body, timeout=self.timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
            except httpx.RequestError as error:
                raise _Again(str(error)) from None
            if answer.status_code in TRANSIENT or answer.status_code >= 500:
                raise _Again(answer.text)
            if not answer.is_success:
                raise ServingError(f"{self.shown} refuses: {answer.text}")
            return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else None

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(_Again), stop=tenacity.stop_after_attempt(self.retries + 1),
                wait=tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT), reraise=True)(once)
        except _Again as error:
            raise ServingError(f"{self.shown} fails: {error}") from None
