"""Models behind a server: what is asked, kept, paid and refused, with a server on loopback that fails in every way."""

import base64
import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from PIL import Image

import sysdpo_jax as sj
from sysdpo_jax.components.remote_cache import CacheError, RemoteCache
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.values import from_json, to_json

KEY = jax.random.key(0)
SECRET = "sk-this-is-never-written-5f2c"


class Answers:
    """Chat completions that repeat the question in capitals. faults: name -> share of requests that meet it."""

    def __init__(self, faults=None, seed=0, slow=0.3):
        self.faults, self.random, self.slow = faults or {}, random.Random(seed), slow
        self.asked, self.delivered, self.headers, self.lock = [], [], [], threading.Lock()

    def fault(self):
        with self.lock:
            draw = self.random.random()
        for name, share in self.faults.items():
            draw -= share
            if draw < 0:
                return name
        return "none"

    def answer(self, body):
        if "messages" in body:
            asked = body["messages"][-1]["content"]
            said = asked.upper() if isinstance(asked, str) else f"{len(asked)} PARTS"
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        else:
            choice = {"text": body["prompt"].upper(), "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"total_tokens": 10}}


@contextmanager
def serving(answers):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with answers.lock:
                answers.asked.append((self.path, body))
                answers.headers.append(dict(self.headers))
            fault = answers.fault()
            if fault in ("429", "500"):
                self.reply(int(fault), b'{"error": {"message": "busy"}}', retry="0")
                return
            if fault == "nothing":
                time.sleep(1.5 * answers.slow)
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(answers.slow / 20)
            data = json.dumps(answers.answer(body)).encode()
            if fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.reply(200, data)
            with answers.lock:
                answers.delivered.append(json.dumps(body, sort_keys=True))

        def reply(self, status, data, retry=None):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if retry:
                self.send_header("Retry-After", retry)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *args):
            pass

    http = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("sysdpo_jax.endpoint.FIRST_WAIT", 0.01)


def remote(url, tmp_path, **settings):
    return sj.RemoteModel(url, "m", cache=str(tmp_path / "cache" / "answers.sqlite"), **settings)


def system_of(component, **node):
    writer = sj.Node("route", sj.Categorical(2, parent_sizes=(3,)), ("q",))
    return sj.CompoundSystem(("q", "text"), (writer, sj.Node("said", component, ("text",), **node)))


def prompts(number):
    return [{"q": row % 3, "text": f"question {row}"} for row in range(number)]


def test_a_value_of_the_run_that_is_no_part_of_the_loss(tmp_path):
    with serving(Answers()) as url:
        system = system_of(remote(url, tmp_path))
        params = system.init(KEY)
        assert list(params) == ["route"]
        runs = sj.rollout(system, params, prompts(3), KEY, samples=2)
        assert [run["said"] for run in runs] == [f"QUESTION {row // 2}" for row in range(6)]
        asked = len(serving_log := runs)
    # The server is gone: nothing of training asks it.
    assert asked == len(serving_log)
    pairs = sj.make_pairs(system, runs, np.arange(6.0), group=2)
    features = sj.prepare_pairs(system, pairs)
    objective = sj.DirectObjective(beta=1.0)
    loss, aux = objective(system, params, params, features, KEY)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert not any("said" in name for name in aux.terms)


def test_padding_asks_for_nothing(tmp_path):
    """A batch of 256 with 3 runs makes 3 requests, and what is there already none."""
    answers = Answers()
    with serving(answers) as url:
        system = system_of(remote(url, tmp_path))
        params = system.init(KEY)
        sj.rollout(system, params, prompts(3), KEY)
        assert len(answers.asked) == 3
        batch = system.attempt(params, [None, prompts(9)[8], None], KEY)
        assert len(answers.asked) == 4
        assert batch[0] is None
        assert batch[1]["said"] == "QUESTION 8"


def test_the_same_rollout_again_pays_nothing(tmp_path):
    answers = Answers()
    with serving(answers) as url:
        runs = [
            sj.rollout(system, system.init(KEY), prompts(3), KEY, samples=4)
            for system in (system_of(remote(url, tmp_path)), system_of(remote(url, tmp_path, concurrency=2)))
        ]
        assert len(answers.asked) == 12
        # Samples of a prompt are requests of their own.
        assert len({body["seed"] for _, body in answers.asked}) == 12
        assert [run["said"] for run in runs[0]] == [run["said"] for run in runs[1]]
        sj.rollout(
            system_of(remote(url, tmp_path)), system_of(remote(url, tmp_path)).init(KEY), prompts(3), jax.random.key(1)
        )
        assert len(answers.asked) == 15


FAULTS = {"429": 0.12, "500": 0.12, "slow": 0.06, "cut": 0.06, "nothing": 0.004}


def test_500_requests_to_a_server_that_fails_in_every_way(tmp_path):
    """Each run is complete or named, none is paid twice, and the key is in no file."""
    answers = Answers(FAULTS, slow=10.0)
    with serving(answers) as url:
        component = remote(url, tmp_path, concurrency=32, timeout=10.0, retries=12, on_error="skip")
        system, skipped = system_of(component), []
        params = system.init(KEY)
        runs = sj.rollout(
            system, params, prompts(500), KEY, skipped=lambda place, error: skipped.append((place, error))
        )
        assert len(runs) + len(skipped) == 500
        assert len(runs) >= 490
        for run in runs:
            assert run["said"] == run["text"].upper()
        for _, error in skipped:
            assert "node 'said'" in str(error)
        again = sj.rollout(system, params, prompts(500), KEY, skipped=lambda *_: None)
        assert len(again) >= len(runs)
    received = Counter(answers.delivered)
    assert max(received.values()) == 1
    assert_nowhere(tmp_path, SECRET)


def assert_nowhere(folder, text):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert text.encode() not in path.read_bytes(), path


def test_the_key_goes_to_the_server_alone(tmp_path, caplog):
    answers = Answers({"500": 1.0})
    with serving(answers) as url:
        component = remote(url, tmp_path, retries=0)
        [outcome] = component.outcomes({"x": ["a"]}, KEY)
    assert answers.headers[0]["Authorization"] == f"Bearer {SECRET}"
    for shown in (repr(component), str(outcome), caplog.text, repr(outcome.__cause__)):
        assert SECRET not in shown
    with pytest.raises(ValueError, match="give the key in the environment"):
        sj.RemoteModel(f"http://user:{SECRET}@127.0.0.1:1", "m")
    with pytest.raises(ValueError, match="give the key in the environment"):
        sj.RemoteModel(f"http://127.0.0.1:1/v1?api-key={SECRET}", "m")
    sj.RemoteModel("http://127.0.0.1:1/v1?api-version=2026-01-01", "m")


@pytest.mark.parametrize("key", [SECRET, 'sk-with/a"slash+0123'])
def test_a_key_that_the_server_repeats_is_in_no_value_and_no_file(key, tmp_path, monkeypatch):
    """As a proxy does that shows what it was sent; JSON may write the key's characters in other ways than they are."""
    monkeypatch.setenv("OPENAI_API_KEY", key)

    class Mirror(Answers):
        def answer(self, body):
            said = f"your header was Bearer {key}, {body['messages'][0]['content']}"
            call = {"id": key, "type": "function", "function": {"name": "look", "arguments": json.dumps({"key": key})}}
            message = {"content": said, "tool_calls": [call]} if "call" in said else {"content": said}
            return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 3}}

    with serving(Mirror()) as url:
        values = remote(url, tmp_path).outcomes({"x": ["a", "call"]}, KEY)
    assert values[0] == "your header was Bearer ..., a"
    [message] = values[1]
    assert message["tool_calls"][0]["id"] == "..."
    for form in (key, json.dumps(key)[1:-1], key.replace("/", "\\/")):
        assert form not in json.dumps(values)
        assert form not in repr(values)
        assert_nowhere(tmp_path, form)


def test_a_word_that_stands_for_no_key_may_be_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "NONE")
    with serving(Answers()) as url:
        assert remote(url, tmp_path).sample({}, {"x": ["none of it"]}, KEY) == ["NONE OF IT"]


def test_of_a_fault_with_the_key_at_its_end_no_part_is_said(tmp_path):
    """What is said of an error is cut, but not within the key."""

    class Faults(Answers):
        def answer(self, body):
            return {"error": {"message": "x" * 290 + SECRET, "code": 400}}

    with serving(Faults()) as url:
        [outcome] = remote(url, tmp_path).outcomes({"x": ["a"]}, KEY)
    assert "xxx" in str(outcome)
    assert SECRET[:6] not in str(outcome)


def test_what_a_budget_leaves_is_kept_and_goes_on(tmp_path):
    answers = Answers()
    with serving(answers) as url:
        system = system_of(remote(url, tmp_path, max_calls=5, on_error="skip"))
        params = system.init(KEY)
        with pytest.raises(ToolError, match=r"max_calls 5: 5 answers of 50 tokens are kept in .*; raise it") as raised:
            sj.rollout(system, params, prompts(8), KEY)
        assert len(answers.asked) == 5
        assert len(raised.value.records) == 5
        with pytest.raises(ToolError, match="max_calls 5"):
            sj.rollout(system, params, prompts(8), KEY)
        assert len(answers.asked) == 5
        system = system_of(remote(url, tmp_path, max_calls=8))
        assert len(sj.rollout(system, params, prompts(8), KEY)) == 8
        assert len(answers.asked) == 8
        system = system_of(remote(url, tmp_path, max_total_tokens=80))
        with pytest.raises(ToolError, match="max_total_tokens 80"):
            sj.rollout(system, params, prompts(9), KEY)


def test_requests_that_come_to_nothing_take_no_budget(tmp_path):
    """Four refused questions are under way when the fifth asks: it waits, and has its room."""
    answers = Answers({"slow": 1.0}, slow=4.0)
    plain = answers.answer

    def some(body):
        refused = body["messages"][0]["content"] < "e"
        return {"error": {"message": "no", "code": 400}} if refused else plain(body)

    answers.answer = some
    with serving(answers) as url:
        outcomes = remote(url, tmp_path, max_calls=2).outcomes({"x": list("abcdef")}, KEY)
    assert outcomes[4:] == ["E", "F"]
    assert all(isinstance(outcome, ToolError) for outcome in outcomes[:4])


def test_a_budget_of_tokens_needs_a_server_that_counts(tmp_path):
    answers = Answers()
    answers.answer = lambda body: {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    with serving(answers) as url:
        outcomes = remote(url, tmp_path, max_total_tokens=5, concurrency=1).outcomes({"x": list("ab")}, KEY)
    assert outcomes[0] == "x"
    assert "counts no tokens" in str(outcomes[1])


def test_equal_requests_under_way_are_one(tmp_path):
    """One key for each row, equal keys for equal rows: nothing tells them apart."""
    answers = Answers({"slow": 1.0}, slow=4.0)
    with serving(answers) as url:
        keys = jax.numpy.stack([KEY] * 4)
        assert remote(url, tmp_path).sample({}, {"x": ["same"] * 4}, keys) == ["SAME"] * 4
    assert len(answers.asked) == 1


@pytest.mark.parametrize(("kind", "path"), [("chat", "/v1/chat/completions"), ("completion", "/v1/completions")])
def test_what_is_asked(kind, path, tmp_path):
    answers = Answers()
    with serving(answers) as url:
        component = remote(
            url, tmp_path, kind=kind, max_tokens=7, temperature=0.5, settings={"top_p": 0.9, "seed": None}
        )
        assert component.sample({}, {"x": ["hello"]}, KEY) == ["HELLO"]
    [(where, body)] = answers.asked
    assert where == path
    given = {"model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    asked = {"prompt": "hello"} if kind == "completion" else {"messages": [{"role": "user", "content": "hello"}]}
    assert body == given | asked


def test_messages_tools_and_pictures(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    schema = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

    def ask(text, image):
        turns = [{"role": "system", "content": "short"}, {"role": "user", "content": [text, image]}]
        return {"messages": turns, "tools": schema}

    answers = Answers()
    with serving(answers) as url:
        component = remote(url, tmp_path, prompt=ask)
        assert component.sample({}, {"x": ["what?"], "y": [picture]}, KEY) == ["2 PARTS"]
    body = answers.asked[0][1]
    assert body["tools"] == schema
    text, image = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "what?"}
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)


def test_calls_of_tools_are_a_message(tmp_path):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    answers = Answers()
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    answers.answer = lambda body: {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    with serving(answers) as url:
        assert remote(url, tmp_path).sample({}, {"x": ["a"]}, KEY) == [[{"role": "assistant", "tool_calls": calls}]]


def test_pictures(tmp_path):
    wanted = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    buffer = io.BytesIO()
    Image.fromarray(wanted).save(buffer, "PNG")
    answers = Answers()
    answers.answer = lambda body: {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
    with serving(answers) as url:
        component = remote(url, tmp_path, kind="image", settings={"size": "6x4"})
        [made] = component.sample({}, {"x": ["a red ball"]}, KEY)
        [other] = component.sample({}, {"x": ["a red ball"]}, jax.random.key(1))
    np.testing.assert_array_equal(made, wanted)
    np.testing.assert_array_equal(other, wanted)
    assert [where for where, _ in answers.asked] == ["/v1/images/generations"] * 2
    assert answers.asked[0][1] == {"model": "m", "prompt": "a red ball", "n": 1, "size": "6x4"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"content": None, "refusal": "no"}, "it refuses to answer"),
        ({"content": "", "finish_reason": "length"}, "raise max_tokens"),
        ({"content": "x", "finish_reason": "content_filter"}, "the server's filter withheld"),
    ],
)
def test_answers_without_a_value_are_paid_once_and_named(answer, said, tmp_path):
    ended = answer.pop("finish_reason", "stop")
    answers = Answers()
    answers.answer = lambda body: {"choices": [{"message": answer, "finish_reason": ended}]}
    with serving(answers) as url:
        for _ in range(2):
            with pytest.raises(ToolError, match=said) as raised:
                remote(url, tmp_path).sample({}, {"x": ["a"]}, KEY)
            assert raised.value.refused
    assert len(answers.asked) == 1


def test_one_row_that_is_refused_leaves_the_others(tmp_path):
    answers = Answers()
    plain = answers.answer

    def some(body):
        return {"error": {"message": "too long", "code": 400}} if "1" in body["messages"][0]["content"] else plain(body)

    answers.answer = some
    with serving(answers) as url:
        outcomes = system_of(remote(url, tmp_path)).attempt(system_of(remote(url, tmp_path)).init(KEY), prompts(3), KEY)
    assert [isinstance(outcome, ToolError) for outcome in outcomes] == [False, True, False]
    assert "node 'said'" in str(outcomes[1])
    assert "too long" in str(outcomes[1])


def test_a_key_that_is_not_valid_ends_all(tmp_path):
    """The first answer says so: no other request begins, and none is tried again."""
    answers = Answers()
    answers.answer = lambda body: {"error": {"message": f"bad key {SECRET}", "code": 401}}
    with serving(answers) as url:
        outcomes = remote(url, tmp_path, concurrency=1).outcomes({"x": ["a", "b", "c"]}, KEY)
    assert len(answers.asked) == 1
    assert "OPENAI_API_KEY" in str(outcomes[0])
    assert SECRET not in str(outcomes[0])
    assert all("not asked after this" in str(outcome) for outcome in outcomes[1:])


def test_a_plate_is_asked_for_each_copy(tmp_path):
    answers = Answers()
    with serving(answers) as url:
        system = system_of(remote(url, tmp_path), plate=3)
        [run] = system.sample(system.init(KEY), prompts(1), KEY)
    assert run["said"] == ["QUESTION 0"] * 3
    assert len({body["seed"] for _, body in answers.asked}) == 3


def test_a_record_must_hold_what_it_said(tmp_path):
    system = system_of(remote("http://127.0.0.1:9", tmp_path))
    with pytest.raises(sj.RecordError, match="lacks a value for the node 'said'"):
        system.prepare([{"q": 0, "text": "a", "route": 1}])


def test_searched_intermediates_are_refused(tmp_path):
    system = system_of(remote("http://127.0.0.1:9", tmp_path))
    params = system.init(KEY)
    records = [sj.PreferenceRecord({"q": 0, "text": "a"}, {"said": "b", "route": 0}, {"said": "c", "route": 1})]
    with pytest.raises(sj.GraphError, match="'said' is a remote model"):
        sj.sampled_batch(system, records, [[{}]], 1)
    with pytest.raises(sj.GraphError, match="'said' is a remote model"):
        sj.draw_intermediates(system, params, [{"q": 0, "text": "a"}], 2, KEY)


def test_equal_requests_of_two_threads_are_one(tmp_path):
    answers, made = Answers({"slow": 1.0}, slow=8.0), [None, None]
    with serving(answers) as url:

        def ask(place):
            made[place] = remote(url, tmp_path, max_calls=3).outcomes({"x": ["a", "b", "c"]}, KEY)

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made == [["A", "B", "C"]] * 2
    assert len(answers.asked) == 3


def test_a_budget_is_that_of_all_threads(tmp_path):
    answers, made = Answers({"slow": 1.0}, slow=4.0), []
    with serving(answers) as url:

        def ask(letter):
            rows = {"x": [f"{letter}{number}" for number in range(6)]}
            made.extend(remote(url, tmp_path, max_calls=5).outcomes(rows, KEY))

        threads = [threading.Thread(target=ask, args=(letter,)) for letter in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers.asked) == 5
    assert sum(isinstance(value, str) for value in made) == 5


def test_a_request_that_failed_in_one_thread_is_made_by_the_other(tmp_path):
    class Once(Answers):
        def answer(self, body):
            if len(self.asked) == 1:
                return {"error": {"message": "this once", "code": 400}}
            return super().answer(body)

    answers, made = Once({"slow": 1.0}, slow=8.0), []
    with serving(answers) as url:
        threads = [
            threading.Thread(target=lambda: made.extend(remote(url, tmp_path).outcomes({"x": ["a"]}, KEY)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(type(value).__name__ for value in made) == ["ToolError", "str"]
    assert len(answers.asked) == 2


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_answer_that_was_cut_says_so(kind, tmp_path):
    class Cut(Answers):
        def answer(self, body):
            made = super().answer(body)
            made["choices"][0]["finish_reason"] = "length"
            return made

    with serving(Cut()) as url:
        system = system_of(remote(url, tmp_path, kind=kind, max_tokens=1))
        [run] = sj.rollout(system, system.init(KEY), prompts(1), KEY)
    assert run["said"] == run["text"].upper()
    assert (run["said"].end, run["said"].tokens) == ("cut", ())
    read = from_json(json.loads(json.dumps(to_json(run["said"]))))
    assert (read, read.end) == (run["said"], "cut")


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "answers.sqlite").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ToolError, match=r"answers\.sqlite are damaged .*: move the file away"):
        remote("http://127.0.0.1:9", tmp_path).sample({}, {"x": ["a"]}, KEY)


@pytest.mark.parametrize("place", ["file/cache.sqlite", "."], ids=["a folder that is a file", "a folder"])
def test_a_cache_that_cannot_be_made_is_named_with_its_node(place, tmp_path):
    (tmp_path / "file").write_text("")
    component = sj.RemoteModel("http://127.0.0.1:9", "m", cache=str(tmp_path / place), on_error="skip")
    system = system_of(component)
    with pytest.raises(ToolError, match=r"node 'said'.*cannot be kept in .*: make room .* as cache"):
        sj.rollout(system, system.init(KEY), prompts(2), KEY)


def test_a_disk_that_fills_up_loses_nothing_that_was_paid(tmp_path, monkeypatch, caplog):
    """The answers under way are used; no other request begins, and the first of those says why."""
    keep, kept = RemoteCache.keep, []

    def full(cache, *args):
        kept.append(args)
        if len(kept) > 3:
            raise CacheError("disk full")
        keep(cache, *args)

    monkeypatch.setattr(RemoteCache, "keep", full)
    answers = Answers()
    with serving(answers) as url:
        system = system_of(remote(url, tmp_path, concurrency=2, on_error="skip"))
        with pytest.raises(ToolError, match=r"node 'said'.*disk full") as raised:
            sj.rollout(system, system.init(KEY), prompts(20), KEY)
        assert len(raised.value.records) == len(answers.asked) == len(kept) < 7
        assert "is used and not kept: disk full" in caplog.text


def test_settings_that_cannot_be(tmp_path):
    for wrong in ({"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}, {"max_tokens": -3}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="RemoteModel"):
            remote("http://127.0.0.1:9", tmp_path, **wrong)
    with pytest.raises(ValueError, match="begin it with http"):
        remote("127.0.0.1", tmp_path)


def test_how_it_is_asked_is_no_part_of_the_system(tmp_path):
    one, other = remote("http://h/v1", tmp_path), remote("http://h/v1", tmp_path, key="K", concurrency=2, max_calls=3)
    assert one == other
    assert hash(one) == hash(other)
    assert one != remote("http://h/v1", tmp_path, temperature=0.5)


SCRIPT = """
import sys, jax, sysdpo_jax as sj
component = sj.RemoteModel(sys.argv[1], "m", cache=sys.argv[2], concurrency=4)
system = sj.CompoundSystem(("text",), (sj.Node("said", component, ("text",)),))
runs = sj.rollout(system, {}, [{"text": f"question {row}"} for row in range(60)], jax.random.key(0))
print(len(runs))
"""


def test_a_rollout_that_was_killed_pays_for_the_rest_alone(tmp_path):
    answers, cache = Answers({"slow": 1.0}, slow=2.0), tmp_path / "cache.sqlite"
    with serving(answers) as url:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), url, str(cache)]
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        while len(answers.delivered) < 20:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
        process.wait()
        kept = sqlite3.connect(cache).execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        before = len(answers.asked)
        assert 16 <= kept <= before < 60
        done = subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
        )
    assert done.stdout.strip() == "60", done.stderr
    assert len(answers.asked) == before + 60 - kept
