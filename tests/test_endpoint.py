"""Requests to a judge: their limits, what is asked again, and what an error says."""

import asyncio
import gzip
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from sysdpo_jax import endpoint
from sysdpo_jax.endpoint import Again, Endpoint, NoCompletionError, RefusedError, _retry_after
from sysdpo_jax.errors import ConfigError

GOOD = {"choices": [{"message": {"content": "7"}}]}


def client(url="http://judge/v1", key="JUDGE_KEY", timeout=5.0, retries=2, **more):
    return Endpoint("the judge", "judge.", url, key, timeout, retries, **more)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)
    monkeypatch.setenv("JUDGE_KEY", "sk-key")


def content(completion):
    return completion["choices"][0]["message"]["content"]


def asked(answers, read=content, **settings):
    """(what `ask` returns or raises, the requests) of a server that answers as the list says, its last for ever."""
    requests, script = [], list(answers)

    def handle(request):
        requests.append(request)
        found = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(found, Exception):
            raise found
        return found()

    async def ask():
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as connections:
            own = client(**settings)
            return await own.ask(connections, own.below("/chat/completions"), {"model": "m"}, read)

    try:
        return asyncio.run(ask()), requests
    except ConfigError as error:
        return error, requests


def response(status=200, body=GOOD, **headers):
    """Makes the answer of a server; what is compressed is so still."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {key.replace("_", "-"): text for key, text in headers.items()}
    return lambda: httpx.Response(status, stream=httpx.ByteStream(data), headers=named)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
        ("https://host/openai/v2", "https://host/openai/v2/chat/completions"),
        ("https://host/chat/completions", "https://host/chat/completions"),
        ("https://host/a?version=1", "https://host/a/chat/completions?version=1"),
    ],
)
def test_where_questions_go(url, endpoint):
    assert str(client(url).below("/chat/completions")) == endpoint


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "/v1", "http://host:port", "http://h\n"])
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match=r"judge\.url"):
        client(url)


OVERLOADED = {"error": {"message": "upstream overloaded", "code": 529}}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (response(500, b"<html>boom</html>"), "500 '<html>boom</html>'"),
        (response(529, {"error": {"message": "overloaded"}}), "529 'overloaded'"),
        (response(429, {"error": "slow down"}), "429 'slow down'"),
        (response(408), "408 "),
        (response(409), "409 "),
        (response(200, OVERLOADED), "an error as its answer, 'upstream overloaded'"),
        (response(200, OVERLOADED | {"choices": []}), "an error as its answer, 'upstream overloaded'"),
        (response(200, {"object": "error", "message": "busy", "code": 50001}), "an error as its answer, 'busy'"),
        (response(200, b"\x00\xff not json", Content_Type="text/plain"), "no chat completion, but text/plain: '\\x00"),
        (response(200, b"<html>Login 42", Content_Type="text/html"), "but text/html: '<html>Login 42'; check judge"),
        (response(200, b'data: {"choices": []}'), "no chat completion"),
        (response(200, b"[" * 100_000), "no chat completion"),
        (response(200, [GOOD]), "no chat completion"),
        (response(200, {"choices": [{"text": "7"}]}), "no chat completion"),
        (response(200, b""), "no chat completion"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
        (httpx.ReadError(""), "ReadError"),
        (httpx.RemoteProtocolError("closed"), "RemoteProtocolError: closed"),
    ],
)
def test_faults_of_the_server_are_asked_again(fault, said):
    def read(completion):
        try:
            return content(completion)
        except KeyError:
            raise NoCompletionError from None

    found, requests = asked([fault, fault, response()], read)
    assert (found, len(requests)) == ("7", 3)
    found, requests = asked([fault], read)
    assert (type(found), len(requests)) == (ConfigError, 3)
    assert "the judge at http://judge/v1 fails after 3 tries (" in str(found)
    assert said in str(found)
    assert str(found).endswith("): try later, what is there is kept")


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        (400, RefusedError, "shorten or change what it is asked"),
        (413, RefusedError, "shorten or change what it is asked"),
        (422, RefusedError, "shorten or change what it is asked"),
        (401, ConfigError, "give a valid key in the environment variable JUDGE_KEY"),
        (403, ConfigError, "give a key that may do this in the environment variable JUDGE_KEY"),
        (404, ConfigError, "check judge.url and judge.model"),
        (418, ConfigError, "check judge.url, judge.model and the key"),
    ],
)
def test_what_the_server_refuses_is_asked_once(status, kind, remedy):
    """An error inside a 200 with such a code is the same."""
    said = {"error": {"message": "too long", "code": status}}
    for sent, shown in ((status, f"{status}"), (200, "an error as its answer,")):
        found, requests = asked([response(sent, said), response()])
        assert (type(found), len(requests)) == (kind, 1)
        assert f"{shown} 'too long'; {remedy}" in str(found)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        ({"type": "invalid_request_error", "code": None}, RefusedError, "shorten or change"),
        ({"type": "invalid_request_error", "code": "context_length_exceeded"}, RefusedError, "shorten or change"),
        ({"code": "content_filter"}, RefusedError, "shorten or change"),
        ({"type": "BadRequestError", "code": 40303}, RefusedError, "shorten or change"),
        ({"type": "request_too_large"}, RefusedError, "shorten or change"),
        ({"type": "authentication_error"}, ConfigError, "give a valid key in the environment variable JUDGE_KEY"),
        ({"type": "invalid_request_error", "code": "invalid_api_key"}, ConfigError, "give a valid key"),
        ({"type": "insufficient_quota", "code": "insufficient_quota"}, ConfigError, "pay the provider's account"),
        ({"type": "permission_error"}, ConfigError, "give a key that may do this"),
        ({"type": "invalid_request_error", "code": "model_not_found"}, ConfigError, "check judge.url and judge.model"),
        ({"type": "NotFoundError"}, ConfigError, "check judge.url and judge.model"),
        ({"code": "404", "type": "invalid_request_error"}, ConfigError, "check judge.url and judge.model"),
    ],
)
def test_refusals_inside_a_200_may_be_words(error, kind, said):
    """The code before the type, which says less."""
    found, requests = asked([response(200, {"error": {"message": "no"} | error}), response()])
    assert (type(found), len(requests)) == (kind, 1)
    assert f"an error as its answer, 'no'; {said}" in str(found)


@pytest.mark.parametrize(
    "error",
    [
        {"type": "rate_limit_error"},
        {"code": "rate_limit_exceeded", "type": "requests"},
        {"type": "server_error"},
        {"type": "overloaded_error", "code": "9" * 5000},
        {"type": "api_error", "code": ["404"]},
    ],
)
def test_faults_inside_a_200_are_asked_again(error):
    found, requests = asked([response(200, {"error": {"message": "later"} | error}), response()])
    assert (found, len(requests)) == ("7", 2)


def test_a_word_alone_may_be_the_error():
    assert type(asked([response(200, {"error": "model_not_found"})])[0]) is ConfigError
    assert type(asked([response(200, {"error": "context_length_exceeded"})])[0]) is RefusedError


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirections_are_not_followed(status):
    found, requests = asked([response(status, b"", Location="http://elsewhere/v1"), response()])
    assert "redirects to 'http://elsewhere/v1', where the key is not sent: give that address" in str(found)
    assert len(requests) == 1


@pytest.mark.parametrize("status", [200, 307, 400, 401, 429, 500])
def test_the_key_is_in_no_error(status, monkeypatch):
    """Whatever repeats it: the server's words, the address, a redirection."""
    echo = response(status, {"error": {"message": "sk-key is wrong"}}, Location="http://elsewhere/?key=sk-key")
    found, _ = asked([echo], url="http://user:pass@judge/v1?token=hidden")
    assert isinstance(found, ConfigError)
    for secret in ("sk-key", "pass", "hidden"):
        assert secret not in str(found)
    assert "http://judge/v1" in str(found)
    assert "sk-key" not in repr(client())
    monkeypatch.setenv("JUDGE_KEY", "sec\nret")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds characters that no API key has") as refused:
        client()
    assert "ret" not in str(refused.value)


@pytest.mark.parametrize("key", ["sk-live-0123456789", "", "$OPENAI_API_KEY", "Bearer x"])
def test_a_key_in_the_place_of_its_name_is_not_repeated(key):
    with pytest.raises(
        ConfigError, match=r"judge\.key is no name of an environment variable: put the key into"
    ) as found:
        client(key=key)
    assert not key or key not in str(found.value)


def test_a_key_that_is_not_set_is_said(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    found, _ = asked([response(401, {"error": {"message": "no key"}})])
    assert "give a valid key in the environment variable JUDGE_KEY, which is not set" in str(found)


def test_the_key_is_sent_to_the_judge(monkeypatch):
    async def header(key):
        monkeypatch.setenv("JUDGE_KEY", key)
        async with client().connections(1) as connections:
            return connections.build_request("POST", "http://judge").headers.get("Authorization")

    assert asyncio.run(header("sk-key")) == "Bearer sk-key"
    assert asyncio.run(header("")) is None
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy")
    with pytest.raises(ConfigError, match="check the variables of the proxy"):
        client().connections(1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1", 1.0),
        (" 30 ", 30.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("-5", 0.0),
        ("nan", 0.0),
    ],
)
def test_when_the_server_asks_to_be_asked_again(value, seconds):
    assert _retry_after(value) == seconds
    date = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < _retry_after(format_datetime(date, usegmt=True)) <= 100
    assert 90 < _retry_after(format_datetime(date.replace(tzinfo=None))) <= 100


def test_a_wait_that_the_server_asks_for_is_kept_where_there_is_time(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    found, requests = asked([response(429, Retry_After="20"), response()])
    assert (found, slept, len(requests)) == ("7", [20.0], 2)
    for value in ("3600", "9" * 400, format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)):
        found, requests = asked([response(429, Retry_After=value), response()])
        assert "fails after 1 try (429 " in str(found)
        assert "it asks to wait " in str(found)
        assert (slept, len(requests)) == ([20.0], 1)


def test_waits_grow_to_a_limit(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 1.0)
    asked([response(500)], retries=7)
    for seconds, least in zip(slept, (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert least <= seconds <= least + 1


def test_tries_end_in_time():
    found, requests = asked([response(500)], retries=1000, patience=0.0)
    assert ("fails after 1 try" in str(found), len(requests)) == (True, 1)


def test_what_a_reader_asks_for_again():
    """Its own error is what is raised in the end."""

    def read(completion):
        raise Again("no", final=RefusedError("no number", "kind"))

    found, requests = asked([response()], read)
    assert (str(found), found.reason, len(requests)) == ("no number", "kind", 3)


def test_answers_that_are_too_long():
    """Decompressed: a megabyte of noughts is a kilobyte on its way."""
    long = b" " * (endpoint.LONGEST_ANSWER + 1)
    for found in (response(200, long), response(200, gzip.compress(long), Content_Encoding="gzip")):
        error, requests = asked([found])
        assert (type(error), error.reason, len(requests)) == (RefusedError, "the answer was too long", 1)
    fits = json.dumps(GOOD).encode().ljust(endpoint.LONGEST_ANSWER)
    assert asked([response(200, gzip.compress(fits), Content_Encoding="gzip")])[0] == "7"
    assert "DecodingError" in str(asked([response(200, b"no gzip", Content_Encoding="gzip")])[0])
    twice = gzip.compress(gzip.compress(long))
    assert "is encoded as 'gzip, gzip'" in str(asked([response(200, twice, Content_Encoding="gzip, gzip")])[0])


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["silence", "headers", "body"],
)
def test_the_whole_request_has_a_deadline(start, drip):
    """A server that always has a little more to say is not waited for."""
    server, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(start)
                while not ended.wait(0.02):
                    connection.sendall(drip)
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()

    async def ask():
        own = client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.3, retries=0)
        async with own.connections(1) as connections:
            await own.ask(connections, own.below("/chat/completions"), {}, content)

    began = time.monotonic()
    try:
        with pytest.raises(ConfigError, match=r"fails after 1 try \(no whole answer within 0.3 seconds"):
            asyncio.run(ask())
        assert time.monotonic() - began < 3
    finally:
        ended.set()
        thread.join()
        server.close()
