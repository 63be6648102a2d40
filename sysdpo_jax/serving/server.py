"""A server of language models: many questions at a time, and the few requests by which it gets parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from sysdpo_jax.endpoint import Endpoint, concurrently
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.serving.engines import ENGINES, AnswerError, Call, Engine, Sampled, Settings

# Seconds after the first try of a request at which no other one begins: a server that loads weights is busy.
PATIENCE = 600.0


class ServingError(ConfigError):
    """A server cannot be used: the message names it, the reason and the remedy."""


@dataclass(frozen=True)
class Server:
    """A server on this machine or another that reads the same folders.

    Args:
        url: Its address, such as http://127.0.0.1:8000.
        model: Name of the model that it began with: the one that the run starts from.
        engine: "vllm" or "sglang".
        key: Name of the environment variable that holds the server's key, if it wants one.
        parallel: Requests at the same time.
        timeout: Seconds that a request may take.
        retries: Further attempts after a failed request, within ten minutes.
        place: Stands before url and the like where they are given, for messages.

    Raises:
        ConfigError: For an address that is none.
        ServingError: For an engine that is not known.
    """

    url: str
    model: str
    engine: Literal["vllm", "sglang"] = "vllm"
    key: str = "SERVER_API_KEY"
    parallel: int = 64
    timeout: float = 600.0
    retries: int = 8
    place: str = "Server: "

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ServingError(f"the engine {self.engine!r} is not known: {meant(self.engine, ENGINES)}")
        self._endpoint()

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return self._endpoint().shown

    def ask(self, adapter: str | None, prompts: Sequence[tuple[list[int], int]], settings: Settings) -> list[Sampled]:
        """A text for each prompt and seed.

        Args:
            adapter: Name of one that was loaded; None for the server's model.
            prompts: Token ids and a seed each.
            settings: How texts are sampled.

        Returns:
            The texts.

        Raises:
            ServingError: The server fails, or refuses a request.
        """
        engine = self._engine
        requests = [engine.completion(self.model, adapter, prompt, seed, settings) for prompt, seed in prompts]

        def read(answer: Any) -> Sampled:
            try:
                return engine.read(answer)
            except AnswerError as error:
                raise ServingError(f"{self.shown} answers otherwise than {self.engine} does: {error}") from None

        endpoint = self._endpoint()
        connections = endpoint.connections(self.parallel)

        async def one(request: Call) -> Sampled:
            path, body = request
            return await endpoint.ask(connections, self._at(path), body, read)

        try:
            return concurrently(one, requests, self.parallel, connections.aclose)
        except ConfigError as error:
            raise ServingError(str(error)) from None

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load LoRA factors in PEFT's layout. Raises `ServingError`."""
        # A name stands for the same factors always: they are there where the answer to an earlier attempt was lost.
        self._tell(self._engine.load_adapter(name, str(folder)), folder, done="already")

    def unload_adapter(self, name: str) -> None:
        """Forget them, if they are there. Raises `ServingError`."""
        self._tell(self._engine.unload_adapter(name), None, done="not")

    @property
    def keeps_tied_heads(self) -> bool:
        """Whether whole weights of a model with tied embeddings cannot be handed over to it."""
        return self._engine.keeps_tied_heads

    def load_weights(self, name: str, folder: Path) -> None:
        """Load a model that transformers can read in the place of the server's own. Raises `ServingError`."""
        for request in self._engine.load_weights(name, str(folder)):
            self._tell(request, folder)

    def _tell(self, request: Call, folder: Path | None, done: str = "") -> None:
        """folder: what it is to read. done: a word with which the server refuses what is done already."""
        endpoint = self._endpoint()
        connections = endpoint.connections(1)

        async def tell(request: Call) -> None:
            path, body = request
            await endpoint.tell(connections, self._at(path), body)

        try:
            concurrently(tell, [request], 1, connections.aclose)
        except ConfigError as error:
            if done and done in str(error):
                return
            reads = "" if folder is None else f", and reads {folder}"
            raise ServingError(f"{error}; to take parameters it is started with {self._engine.needs}{reads}") from None

    @property
    def _engine(self) -> Engine:
        return ENGINES[self.engine]

    def _at(self, path: str) -> httpx.URL:
        url = httpx.URL(self.url)
        return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1") + path)

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            "the server", self.place, self.url, self.key, self.timeout, self.retries, "sampled text", PATIENCE
        )
