"""A model behind a server that speaks OpenAI's API: sampled as a part of the system, never trained.

It has no parameters, and its log-ratio is exactly 0: what it says is part of a run, as a tool's value is. Unlike a tool
it is drawn, so that a record must hold what it said: nothing asks it again for a record, in a step or before.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import httpx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs, RecordError, batch_size
from sysdpo_jax.components.remote_cache import CacheError, RemoteCache
from sysdpo_jax.components.remote_requests import (
    PATHS,
    BudgetError,
    Kind,
    Limits,
    NotAskedError,
    PaidRequests,
    RemoteRequest,
    asked_of,
    value_of,
)
from sysdpo_jax.components.tool import NotCalledError, ToolError, raise_first
from sysdpo_jax.endpoint import Endpoint, RefusedError
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import user_cache
from sysdpo_jax.keys import row_keys
from sysdpo_jax.typing import Features, Keys, Params, Parents
from sysdpo_jax.user_code import name_of, user_code

# Seconds after the first try of a request at which no other one begins.
PATIENCE = 600.0
# In the names of what a url may not hold, because it is written down.
SECRETS = ("key", "token", "secret", "password", "signature", "sig")
# Bytes of an answer: a picture of 2048 x 2048 as PNG has up to 17 million.
LONGEST = 64 * 2**20


@dataclass(frozen=True)
class RemoteModel(Component):
    """`model` of the server at `url`, which speaks OpenAI's API.

    What it is asked and what it answers lies in a cache: a request that was answered is never made again, by whatever
    process, so that a rollout that goes on pays nothing twice. Samples of one prompt are requests of their own: each
    has a seed, from the key of its row. How it is asked (from `key` on) is no part of what a system is.

    Args:
        url: Address of the server, such as https://api.openai.com/v1; /v1 is added where there is no path.
        model: Name of the model on that server.
        kind: "chat" and "completion" give a text, "image" a picture, uint8 [height, width, 3].
        prompt: Module-level function of the parents' values, in the order of Node.parents, that returns a string or,
            of a chat, messages; by default the node's only parent is the prompt. Pictures among a message's content
            (a list of texts and pictures) are sent as PNG.
        max_tokens: Largest number of tokens of an answer; None for the server's.
        temperature: Of the samples; None for the server's.
        settings: Further fields of the request, {"top_p": 0.9}, as the server knows them; None leaves one out. They are
            kept as JSON.
        key: Name of the environment variable that holds the API key, which is written nowhere.
        concurrency: Requests at the same time, of each process.
        retries: Further attempts after a failed request, within ten minutes.
        timeout: Seconds that a whole request may take.
        max_calls: Answers of the model that the cache may hold: the budget; None for no limit.
        max_total_tokens: Tokens, of questions and answers, that they may cost together. Requests that are under way
            when it is reached are finished.
        cache: "user" for the user's cache, or a file.
        on_error: Of a request that failed for good. "stop" raises once the requests under way are finished; "skip"
            leaves the run out, and counts it.

    Raises:
        ConfigError: For an address that is none, or that holds a password.
        ValueError: For a value that none of the others can have.
    """

    url: str
    model: str
    kind: Kind = "chat"
    prompt: Callable[..., Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    settings: Mapping[str, Any] | tuple[tuple[str, str], ...] = ()
    key: str = field(default="OPENAI_API_KEY", compare=False)
    concurrency: int = field(default=8, compare=False)
    retries: int = field(default=8, compare=False)
    timeout: float = field(default=300.0, compare=False)
    max_calls: int | None = field(default=None, compare=False)
    max_total_tokens: int | None = field(default=None, compare=False)
    cache: str = field(default="user", compare=False)
    on_error: Literal["stop", "skip"] = field(default="stop", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            # A dictionary cannot be hashed, nor can what one may hold.
            kept = tuple((name, json.dumps(value)) for name, value in sorted(self.settings.items()))
            object.__setattr__(self, "settings", kept)
        if self.kind not in PATHS:
            raise ValueError(f"RemoteModel: kind {self.kind!r} is none of {', '.join(PATHS)}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"RemoteModel: on_error {self.on_error!r} is neither 'stop' nor 'skip'")
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise ValueError("RemoteModel: concurrency must be at least 1, retries at least 0, timeout above 0")
        limits = {name: getattr(self, name) for name in ("max_tokens", "max_calls", "max_total_tokens")}
        for name, value in limits.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"RemoteModel: {name} {value!r} must be a whole number of at least 1, or None")
        if self.temperature is not None and not (isinstance(self.temperature, int | float) and self.temperature >= 0):
            raise ValueError(f"RemoteModel: temperature {self.temperature!r} must be a number of at least 0, or None")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError("RemoteModel: the model has no name: give that which the server knows, a text")
        if self.kind == "image" and (self.max_tokens is not None or self.temperature is not None):
            raise ValueError("RemoteModel: a picture has neither max_tokens nor temperature: leave them out")
        # An address that is none should not wait for the first prompt.
        url = httpx.URL(self._endpoint().url)
        secret = [name for name in url.params if any(word in name.lower() for word in SECRETS)]
        if url.userinfo or secret:
            raise ConfigError("RemoteModel: the url holds a key or a password: give the key in the environment")

    @property
    def parameterless(self) -> bool:
        return True

    @property
    def row_by_row(self) -> bool:
        return True

    def init(self, key: PRNGKeyArray) -> Params:
        return {}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        return np.zeros((len(values), 0), np.float32)

    @property
    def prepared_by(self) -> Any:
        return ()

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        return jnp.zeros(features.shape[0])

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        """Ask once a row.

        Args:
            params: None, {}.
            parents: `{parent: values}`.
            key: Of the seeds: one for all rows, or one a row.

        Returns:
            A text or a picture for each row, a `SampledText` without tokens of a text that was cut at max_tokens. A
            chat's answer with calls of tools is a list of the one message.

        Raises:
            ToolError: The first row that has none, whatever on_error says.
        """
        outcomes = self.outcomes(parents, key)
        raise_first(outcomes, "row")
        return outcomes

    def outcomes(self, parents: Parents, key: Keys) -> list[Any]:
        """Ask once a row, and keep what comes.

        Args:
            parents: `{parent: values}`.
            key: As for `sample`.

        Returns:
            Of each row the value or the `ToolError`.
        """
        rows = batch_size(parents, "RemoteModel")
        draws = (np.asarray(jax.vmap(_bits)(row_keys(key, rows))) >> 1).tolist()
        made: list[Any] = [None] * rows
        for row, values in enumerate(zip(*parents.values(), strict=True)):
            try:
                made[row] = RemoteRequest(self._body(values, row, draws[row]), draws[row])
            except RecordError as error:
                made[row] = ToolError(str(error), self.on_error == "skip", refused=True)
        asked = [one for one in made if isinstance(one, RemoteRequest)]
        paid = PaidRequests(self._endpoint(), self.kind, self._cache(), self._limits, self.on_error == "stop")
        try:
            answers = iter(paid.answers(asked, self.concurrency))
        except CacheError as error:
            answers = repeat(error)
        return [self._outcome(next(answers)) if isinstance(one, RemoteRequest) else one for one in made]

    def _outcome(self, answer: Any) -> Any:
        """The value of an answer, or the `ToolError` of whatever came in its place."""
        skip = self.on_error == "skip"
        try:
            if isinstance(answer, Exception):
                raise answer
            return value_of(self.kind, answer)
        except (BudgetError, CacheError) as error:
            # Whatever else may be left out: budget and cache are for all.
            return ToolError(str(error))
        except NotAskedError as error:
            return NotCalledError(str(error))
        except (RefusedError, RecordError) as error:
            said = str(error) if str(error).startswith(self.shown) else f"{self.shown}: {error}"
            return ToolError(said, skip, refused=True)
        except ConfigError as error:
            return ToolError(str(error), skip)

    def _body(self, values: Sequence[Any], row: int, seed: int) -> dict[str, Any]:
        """What the server is sent. Raises `RecordError` for a prompt that it cannot be sent."""
        if self.prompt is None and len(values) != 1:
            raise RecordError(f"a remote model without a prompt function reads exactly one parent, got {len(values)}")
        prompt = values[0]
        if self.prompt is not None:
            with user_code(f"the prompt function {name_of(self.prompt)} in row {row}", RecordError, (RecordError,)):
                prompt = self.prompt(*values)
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": seed}
        # Servers of pictures know no seed, by which its samples are told apart here all the same.
        given = {"n": 1} if self.kind == "image" else given
        fields = {"model": self.model} | asked_of(self.kind, prompt, row) | given
        fields |= {name: json.loads(value) for name, value in dict(self.settings).items()}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def _limits(self) -> Limits:
        return Limits(self.max_calls, self.max_total_tokens)

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return f"the model {self.model!r}"

    def _endpoint(self) -> Endpoint:
        answers = {"chat": "chat completion", "completion": "completion", "image": "picture"}[self.kind]
        return Endpoint(self.shown, "its ", self.url, self.key, self.timeout, self.retries, answers, PATIENCE, LONGEST)

    def _cache(self) -> RemoteCache:
        return RemoteCache(user_cache() / "remote.sqlite" if self.cache == "user" else Path(self.cache))


def _bits(key: PRNGKeyArray) -> Any:
    return jax.random.bits(key, dtype="uint32")
