"""What a server that speaks OpenAI's API is asked, what it answers, and what is asked for at all."""

import asyncio
import base64
import binascii
import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
from PIL import Image

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import MESSAGES, TOOLS, is_messages, kind, read_tools
from sysdpo_jax.components.images import as_png, open_picture
from sysdpo_jax.components.remote_cache import CacheError, RemoteCache, Spent, request_id
from sysdpo_jax.endpoint import Again, Endpoint, NoCompletionError, RefusedError, concurrently
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.values import SampledText

Kind = Literal["chat", "completion", "image"]
# Below the server's address.
PATHS: Mapping[Kind, str] = {
    "chat": "/chat/completions",
    "completion": "/completions",
    "image": "/images/generations",
}
# Seconds after which a request that has no room, or waits for its like, looks again.
POLL = 0.02
# Of this process, whatever calls they are of: requests that are taken care of, by cache and name, and how many are
# made, by cache and model. What is there is changed and counted under the lock.
_TAKEN: set[tuple[str, str]] = set()
_UNDER_WAY: Counter[tuple[str, str]] = Counter()
_LOCK = threading.Lock()

logger = logging.getLogger(__name__)
# What servers say of an answer that they did not come to the end of by a fault of their own, and of one withheld.
BROKEN, FILTERED = ("error", "abort"), ("content_filter",)


class BudgetError(ConfigError):
    """What may be spent is spent: says how much that was, and the remedy."""


class NotAskedError(ConfigError):
    """A request was not made because of another one: says which."""


class Limits(NamedTuple):
    """What a model's answers may cost together; None for any number."""

    calls: int | None
    tokens: int | None


class RemoteRequest(NamedTuple):
    """A request's body, and what tells it from samples of the same."""

    body: Mapping[str, Any]
    draw: int


def asked_of(kind_: Kind, prompt: Any, row: int) -> dict[str, Any]:
    """The fields of a request that a prompt makes. Raises `RecordError` naming the row for one that it cannot be."""
    if kind_ != "chat":
        if not isinstance(prompt, str):
            raise RecordError(f"the prompt in row {row} is {kind(prompt)}, and a {kind_} takes a text alone")
        return {"prompt": str(prompt)}
    if isinstance(prompt, Mapping) and MESSAGES in prompt:
        rest = {name: value for name, value in prompt.items() if name != MESSAGES}
        if TOOLS in rest:
            rest[TOOLS] = read_tools(rest[TOOLS], f"the prompt in row {row}, field {TOOLS!r}")
        return _plain(asked_of("chat", prompt[MESSAGES], row) | rest, row)
    if isinstance(prompt, str) or _is_picture(prompt):
        prompt = [{"role": "user", "content": prompt}]
    if not is_messages(prompt):
        raise RecordError(f"the prompt in row {row} must be a text, a picture or messages, not {kind(prompt)}")
    return _plain({"messages": [{**turn, "content": _content(turn.get("content"), row)} for turn in prompt]}, row)


def stored(kind_: Kind, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an answer. Raises `Again` or `NoCompletionError` for one that is none."""
    try:
        if kind_ == "image":
            [picture] = answer["data"]
            return {"b64_json": picture.get("b64_json"), "url": picture.get("url")}
        choice = answer["choices"][0]
        said = choice["message"] if kind_ == "chat" else {"content": choice["text"]}
        ended = str(choice.get("finish_reason") or "").lower()
        names = ("content", "tool_calls", "refusal")
        made = {name: said[name] for name in names if said.get(name)} | {"finish_reason": ended}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise NoCompletionError from None
    if ended in BROKEN:
        raise Again(f"the answer was broken off ({ended})")
    return made


def tokens_of(answer: Mapping[str, Any]) -> int | None:
    """The tokens of question and answer that the server counted; None where it says none."""
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if isinstance(total, int) else None


def value_of(kind_: Kind, answer: Mapping[str, Any]) -> Any:
    """The value of a node that an answer stands for. Raises `RefusedError` where it stands for none."""
    if kind_ == "image":
        return _picture(answer)
    if answer["finish_reason"] in FILTERED:
        raise RefusedError("the server's filter withheld the answer: change the prompt", "the answer was withheld")
    if "tool_calls" in answer:
        message = {"role": "assistant", "content": answer.get("content"), "tool_calls": answer["tool_calls"]}
        return [{name: value for name, value in message.items() if value is not None}]
    content = answer.get("content", "")
    if not content and "refusal" in answer:
        said = str(answer["refusal"])[:300]
        raise RefusedError(f"it refuses to answer ({said!r}): change the prompt", "the model refused")
    if not content and answer["finish_reason"] == "length":
        raise RefusedError("all of max_tokens went into its reasoning: raise max_tokens", "the answer was cut")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if answer["finish_reason"] == "length":
        return SampledText(str(content), (), "cut", "")
    return str(content)


@dataclass
class PaidRequests:
    """Answers to many requests: those that are kept, and, within the budget, those that are asked for.

    endpoint: of the model. kind: of what it makes. cache: where answers are kept. stops: whether a server that fails
    for good is asked no more. ended: why no request begins any more. told: whether an answer says so.
    """

    endpoint: Endpoint
    kind: Kind
    cache: RemoteCache
    limits: Limits
    stops: bool
    ended: ConfigError | None = None
    told: bool = False

    def answers(self, requests: Sequence[RemoteRequest], parallel: int) -> list[Any]:
        """For each request what is kept of its answer, or the error. Equal ones are asked once, by the whole process.

        At the end of the budget, where answers cannot be kept and, where an error stops, after one that is not of one
        request alone, no other request begins; those under way are finished. Raises `CacheError`.
        """
        shown = str(self.endpoint.below(PATHS[self.kind]).copy_with(query=None))
        names = [request_id(shown, request.body, request.draw) for request in requests]
        made = {name: self.cache.find(name) for name in dict.fromkeys(names)}
        bodies = dict(zip(names, (request.body for request in requests), strict=True))
        waiting = [name for name, answer in made.items() if answer is None]
        if waiting:
            connections = self.endpoint.connections(parallel)

            async def ask(name: str) -> Any:
                return await self._taken(connections, name, bodies[name])

            made |= zip(waiting, concurrently(ask, waiting, parallel, connections.aclose), strict=True)
        return [made[name] for name in names]

    async def _taken(self, connections: httpx.AsyncClient, name: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request that no other call of this process makes at the same time."""
        place = (str(self.cache.path.resolve()), name)
        while not _add(place):
            await asyncio.sleep(POLL)
        try:
            found = self.cache.find(name)
            return await self._answer(connections, name, body) if found is None else found
        except CacheError as error:
            return self._end(error)
        finally:
            _TAKEN.discard(place)

    async def _answer(self, connections: httpx.AsyncClient, name: str, body: Mapping[str, Any]) -> Any:
        while (over := self._begin()) is not None:
            if self.ended is None and self._under_way:
                # Those under way may come to nothing, and leave room.
                await asyncio.sleep(POLL)
                continue
            return self._end(over)

        def keep(answer: Any) -> Any:
            found, tokens = stored(self.kind, answer), tokens_of(answer)
            # Before anything else can go wrong: it is paid for.
            try:
                self.cache.keep(name, self.endpoint.shown, found, tokens or 0)
            except CacheError as error:
                logger.warning("an answer of %s is used and not kept: %s", self.endpoint.shown, error)
                self.ended = self.ended or error
            if tokens is None and self.limits.tokens is not None:
                self.ended = self.ended or BudgetError(
                    f"{self.endpoint.shown} counts no tokens, by which max_total_tokens could end it: use max_calls"
                )
            return found

        try:
            return await self.endpoint.ask(connections, self.endpoint.below(PATHS[self.kind]), body, keep)
        except RefusedError as error:
            return error
        except ConfigError as error:
            return self._end(error) if self.stops else error
        finally:
            with _LOCK:
                _UNDER_WAY[self._account] -= 1

    @property
    def _account(self) -> tuple[str, str]:
        return str(self.cache.path.resolve()), self.endpoint.shown

    @property
    def _under_way(self) -> int:
        return _UNDER_WAY[self._account]

    def _end(self, error: ConfigError) -> ConfigError:
        """Begin no other request. The error where no answer has told it yet, else that this one was not asked for."""
        if self.ended is None:
            self.ended = error
        if self.told and error is self.ended:
            return NotAskedError(f"not asked after this: {error}")
        self.told = self.told or error is self.ended
        return error

    def _begin(self) -> ConfigError | None:
        """Count one more request that is under way, or say why there is none."""
        with _LOCK:
            over = self.ended or self._over()
            if over is None:
                _UNDER_WAY[self._account] += 1
            return over

    def _over(self) -> BudgetError | None:
        calls, tokens = self.limits
        if calls is None and tokens is None:
            return None
        spent = self.cache.spent(self.endpoint.shown)
        if calls is not None and spent.calls + self._under_way >= calls:
            return self._used_up(f"max_calls {calls}", spent)
        if tokens is not None and spent.tokens >= tokens:
            return self._used_up(f"max_total_tokens {tokens}", spent)
        return None

    def _used_up(self, limit: str, spent: Spent) -> BudgetError:
        return BudgetError(
            f"the budget of {self.endpoint.shown} is used up, {limit}: {spent.calls} answers of {spent.tokens} tokens "
            f"are kept in {self.cache.path}; raise it, and what is missing is asked"
        )


def _add(place: tuple[str, str]) -> bool:
    """Whether the request was free to be taken care of."""
    with _LOCK:
        free = place not in _TAKEN
        _TAKEN.add(place)
        return free


def _picture(answer: Mapping[str, Any]) -> np.ndarray:
    if not answer.get("b64_json"):
        raise RefusedError(
            'the picture came as an address: add "response_format": "b64_json" to its settings', "no picture"
        )
    try:
        data = base64.b64decode(answer["b64_json"], validate=True)
        pixels = open_picture(data, "the picture")
    except (RecordError, binascii.Error, TypeError, ValueError) as error:
        raise RefusedError(f"the picture cannot be read: {error}", "no picture") from None
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3)


def _content(content: Any, row: int) -> Any:
    if _is_picture(content):
        content = [content]
    if not isinstance(content, list | tuple):
        return content
    return [_part(part, row) for part in content]


def _part(part: Any, row: int) -> Any:
    if _is_picture(part):
        data = base64.b64encode(as_png(part, f"picture in row {row}")).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "text", "text": str(part)} if isinstance(part, str) else part


def _plain(fields: dict[str, Any], row: int) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads(json.dumps(fields))
    except (TypeError, ValueError) as error:
        raise RecordError(f"the prompt in row {row} holds what JSON cannot hold ({error})") from None
    return made
