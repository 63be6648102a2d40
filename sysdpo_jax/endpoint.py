"""Requests to servers that speak JSON, as OpenAI's does: their limits, and which are made again."""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import httpx
import tenacity

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.threads import DaemonExecutor

# Worth another try, as all faults of the server (5xx) are: timeout, conflict, too early, too many requests.
TRANSIENT = (408, 409, 425, 429)
# Of one question: it is too long, or the server's filter does not let it through.
OF_THE_QUESTION = (400, 413, 422)
REMEDIES = {
    401: "give a valid key in the environment variable {key}",
    402: "pay the provider's account",
    403: "give a key that may do this in the environment variable {key}",
    404: "check {field}url and {field}model",
    405: "check {field}url",
}
# What servers write in the place of a status, in `code` or `type` of an error: small letters, without "_" and "error".
WORDS = {
    400: "invalidrequest badrequest invalidargument invalidprompt contextlengthexceeded exceedcontextsize "
    "stringabovemaxlength contentfilter contentpolicyviolation",
    401: "authentication unauthorized unauthenticated invalidapikey",
    402: "insufficientquota billing",
    403: "permission permissiondenied",
    404: "notfound modelnotfound deploymentnotfound",
    413: "requesttoolarge",
    422: "unprocessableentity",
    429: "ratelimit ratelimitexceeded",
}
# Bytes of an answer after decompression. A hundred thousand words of reasoning have less than a quarter of them.
LONGEST_ANSWER = 4 * 2**20
# Bytes of one that says nothing of its own in which words are looked for.
LONGEST_SAID = 4096
# Servers of which it was said in this process that they are waited for.
_ANNOUNCED: set[str] = set()
ENCODINGS = ("", "identity", "gzip", "deflate")
# Characters of a key that is replaced in answers too: a shorter one, "none", is a word that an answer may well have.
SECRET = 8
# Seconds before the second try of a question, about twice as many before each next one, and at most.
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
# Seconds after the first try of a question at which no other one begins.
PATIENCE = 120.0

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class Again(Exception):
    """Worth another try, after `wait` seconds at the earliest. final: what is raised where no other one is made."""

    def __init__(self, reason: str, wait: float = 0.0, final: ConfigError | None = None):
        super().__init__(reason)
        self.wait, self.final = wait, final


class NoCompletionError(Exception):
    """What came is no answer of the kind that was asked for."""


class RefusedError(ConfigError):
    """A server refuses one request, which says nothing of the others. reason: the kind of refusal, for counts."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Endpoint:
    """Asks the server at `url`.

    name: of the server, for messages. prefix: stands before url, model and the like where a user gives them.
    key_name: the environment variable with the key, which is sent as it is, if there is one; where a server repeats it,
    in answers as in errors, it is replaced. timeout: seconds in which a request must be answered whole. retries: of a
    request, which end after `patience` seconds. wanted: what its answers are, for messages. longest: bytes that one
    may have.
    """

    name: str
    prefix: str
    url: str
    key_name: str
    timeout: float
    retries: int
    wanted: str = "chat completion"
    patience: float = PATIENCE
    longest: int = LONGEST_ANSWER

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.prefix}url {self.url!r} is no address ({error}): fix it") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{self.prefix}url is {self.url!r}: begin it with http:// or https:// and a host")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.key_name):
            # It is not said: who mistakes the field for the key itself gives that.
            raise ConfigError(
                f"{self.prefix}key is no name of an environment variable: put the key into one, and give its name"
            )
        if not self.key.isascii() or not self.key.isprintable():
            raise ConfigError(f"the environment variable {self.key_name} holds characters that no API key has")

    @property
    def key(self) -> str:
        """As it is in the environment now: nothing holds it that could be written."""
        return os.environ.get(self.key_name, "").strip()

    def below(self, path: str) -> httpx.URL:
        """Where requests of a kind go, "/chat/completions": below the address that OpenAI's client would be given."""
        url = httpx.URL(self.url)
        given = url.path.rstrip("/")
        return url.copy_with(path=given if given.endswith(path) else f"{given or '/v1'}{path}", fragment=None)

    def connections(self, parallel: int) -> httpx.AsyncClient:
        """The connections that `ask` takes, to be closed. parallel: questions at a time."""
        try:
            return httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
                # `ask` has one limit for the whole request.
                timeout=None,
                # They would take key and question to another server.
                follow_redirects=False,
                limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self.name} cannot be asked ({error}): check the variables of the proxy") from None

    async def ask(
        self, connections: httpx.AsyncClient, url: httpx.URL, body: Mapping[str, Any], read: Callable[[Any], T]
    ) -> T:
        """What `read` makes of the answer, a JSON object. Where `read` raises `Again` the question is asked again.

        Raises `RefusedError` for a request that the server refuses, and `ConfigError` for a server that fails.
        """
        return await self._sent(connections, url, body, lambda answer, about: self._read(answer, about, read))

    async def tell(self, connections: httpx.AsyncClient, url: httpx.URL, body: Mapping[str, Any]) -> None:
        """`ask` for no answer but that it was done."""
        await self._sent(connections, url, body, lambda answer, about: None)

    async def _sent(
        self, connections: httpx.AsyncClient, url: httpx.URL, body: Mapping[str, Any], read: Callable[[bytes, Any], T]
    ) -> T:
        data = json.dumps(body).encode()
        backoff = tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT)
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Again),
            wait=lambda state: max(backoff(state), cast(Any, state.outcome).exception().wait),
            stop=tenacity.stop_after_attempt(self.retries + 1) | tenacity.stop_before_delay(self.patience),
            before_sleep=self._announce,
        )
        try:
            return await tries(self._once, connections, url, data, read)
        except tenacity.RetryError as error:
            failed = self._failed(error.last_attempt)
        except ConfigError as error:
            failed = error
        failed.args = (self._without_key(str(failed)),)
        raise failed from None

    def _announce(self, state: tenacity.RetryCallState) -> None:
        """Say once of a client that it waits; what its tries come to in the end says an error."""
        if self.shown not in _ANNOUNCED:
            _ANNOUNCED.add(self.shown)
            said = self._without_key(str(cast(Any, state.outcome).exception()))
            limit = f"{self.retries} {'time' if self.retries == 1 else 'times'} within {self.patience / 60:g} minutes"
            logger.warning("%s does not answer (%s): asked again, up to %s", self.shown, said, limit)

    async def _once(
        self, connections: httpx.AsyncClient, url: httpx.URL, data: bytes, read: Callable[[bytes, Any], T]
    ) -> T:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}
        request = connections.stream("POST", url, content=data, headers=headers)
        try:
            async with asyncio.timeout(self.timeout), request as response:
                answer = await self._whole(response)
        except TimeoutError:
            raise Again(f"no whole answer within {self.timeout:g} seconds, {self.prefix}timeout") from None
        except httpx.RequestError as error:
            asked = f"; is it started, and {self.prefix}url right?" if isinstance(error, httpx.ConnectError) else ""
            raise Again(f"{type(error).__name__}: {error}".rstrip(": ") + asked) from None
        if not response.is_success:
            raise self._fault(response.status_code, f"{response.status_code} {self._said(answer)}", response.headers)
        return read(answer, response.headers)

    def _read(self, answer: bytes, about: Mapping[str, str], read: Callable[[Any], T]) -> T:
        """about: the headers of the answer."""
        try:
            completion = self._hidden(_as_object(answer))
            if fault := completion.get("error"):
                raise self._fault(_code(fault), f"an error as its answer, {self._said(answer)}", about)
            return read(completion)
        except NoCompletionError:
            kind = about.get("Content-Type", "of no type")
            raise Again(
                f"what answers is no {self.wanted}, but {kind}: {self._said(answer)}; check {self.prefix}url"
            ) from None

    async def _whole(self, response: httpx.Response) -> bytes:
        encoding = response.headers.get("Content-Encoding", "").lower()
        if encoding not in ENCODINGS:
            raise Again(f"the answer is encoded as {encoding!r}, which was not asked for")
        answer = bytearray()
        async for part in response.aiter_bytes():
            answer += part
            if len(answer) > self.longest:
                raise RefusedError(
                    f"the answer of {self.shown} has more than {self.longest} bytes and begins with "
                    f"{self._said(bytes(answer))}: limit it by {self.prefix}max_tokens, or check {self.prefix}url",
                    "the answer was too long",
                )
        return bytes(answer)

    def _fault(self, status: int, said: str, headers: Mapping[str, str]) -> Exception:
        """What to raise for a status that is no success."""
        if status in TRANSIENT or status >= 500:
            wait = _retry_after(headers.get("Retry-After", ""))
            return Again(said + (f", it asks to wait {wait:.0f} seconds" if wait > 0 else ""), wait)
        if status < 400:
            target = headers.get("Location", "nowhere")
            return ConfigError(
                f"{self.shown} redirects to {target!r}, where the key is not sent: give that address "
                f"as {self.prefix}url, if it is the server's"
            )
        if status in OF_THE_QUESTION:
            return RefusedError(
                f"{self.shown} refuses the question: {said}; shorten or change what it is asked, or check "
                f"{self.prefix}model",
                "the question was refused",
            )
        remedy = REMEDIES.get(status, "check {field}url, {field}model and the key")
        key = self.key_name if self.key else f"{self.key_name}, which is not set"
        remedy = remedy.format(key=key, field=self.prefix)
        return ConfigError(f"{self.shown} refuses: {said}; {remedy}")

    def _failed(self, attempt: Any) -> ConfigError:
        again, tries = attempt.exception(), attempt.attempt_number
        if again.final is not None:
            return again.final
        return ConfigError(
            f"{self.shown} fails after {tries} {'try' if tries == 1 else 'tries'} ({again}): try later, what is there "
            "is kept"
        )

    @property
    def shown(self) -> str:
        """Its name, and its address without what may be secret."""
        url = httpx.URL(self.url).copy_with(username=None, password=None, query=None, fragment=None)
        return f"{self.name} at {url}"

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "...") if self.key else text

    def _hidden(self, value: Any) -> Any:
        """What an answer holds, without the key."""
        if len(self.key) < SECRET:
            return value
        if isinstance(value, dict):
            return {self._without_key(name): self._hidden(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._hidden(item) for item in value]
        return self._without_key(value) if isinstance(value, str) else value

    def _said(self, answer: bytes) -> str:
        """The server's own words, where it has any, else the beginning of what came. Cut when the key is out."""
        try:
            found = json.loads(answer)
            error = found.get("error") or found
            said = error if isinstance(error, str) else error["message"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = answer[:LONGEST_SAID].decode(errors="replace")
        return repr(self._without_key(str(said))[:300])


def _as_object(answer: bytes) -> dict[str, Any]:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        raise NoCompletionError from None
    if not isinstance(found, dict):
        raise NoCompletionError
    # As some servers write errors: without an object of their own.
    return {"error": found} if not {"choices", "data"} & found.keys() and "message" in found else found


def _code(error: Any) -> int:
    """The status that an error inside a 200 names as a number or in a word, 500 where it names none."""
    # A code says more than a type: "model_not_found", which is an "invalid_request_error".
    names = (error.get("code"), error.get("type")) if isinstance(error, dict) else (error,)
    for name in map(str, names):
        if re.fullmatch("[45][0-9]{2}", name):
            return int(name)
        word = re.sub("[^a-z]", "", name.lower()).removesuffix("error")
        for status, words in WORDS.items():
            if word in words.split():
                return status
    return 500


def _retry_after(value: str) -> float:
    """Seconds of the header, which has seconds or a date; 0 for one that is past or cannot be read."""
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (zoned - datetime.now(UTC)).total_seconds())


def concurrently(
    call: Callable[[T], Coroutine[Any, Any, R]],
    items: Sequence[T],
    parallel: int,
    close: Callable[[], Coroutine[Any, Any, None]],
) -> list[R]:
    """What `call` returns for each of the items, `parallel` of them at a time; then `close` is awaited.

    In a thread with an event loop of its own, for a notebook has one in the caller's. What a call raises ends the
    others and is raised; so does whatever interrupts the caller.
    """

    async def one(item: T, limit: asyncio.Semaphore) -> R:
        async with limit:
            return await call(item)

    async def every() -> list[R]:
        limit, tasks = asyncio.Semaphore(parallel), list[asyncio.Task[R]]()
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(one(item, limit)) for item in items]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await close()
        return [task.result() for task in tasks]

    loops = SimpleQueue[asyncio.AbstractEventLoop]()

    def work() -> list[R]:
        with asyncio.Runner() as runner:
            loops.put(runner.get_loop())
            return runner.run(every())

    with DaemonExecutor(1, "requests") as thread:
        made, loop = thread.submit(work), loops.get()
        try:
            return made.result()
        except BaseException:
            if not made.done():
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise
