"""A judge as a command has it: what it is asked, which scores are kept, and how it ends."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sysdpo_jax import endpoint
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation.judge import Template, make_judge, read_template
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.scoring import as_completed, check_scorer, score_runs
from sysdpo_jax.runs.runs_file import read_lines

RUNS = 12


class Server(BaseHTTPRequestHandler):
    """Answers a question with what `answer`, a function of its number and text, says: (status, content), or nothing."""

    protocol_version = "HTTP/1.1"
    # An answer is one packet.
    wbufsize = -1
    answer = None
    seen: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append((self.path, body, self.headers.get("Authorization")))
        status, content = Server.answer(len(Server.seen), body["messages"][0]["content"])
        data = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        text = json.dumps(data if status == 200 else {"error": {"message": content}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass

    def handle(self):
        # A command that ends leaves its questions.
        with suppress(ConnectionError):
            super().handle()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with runs and a question, and the flags that ask a server on this machine."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)
    rows = [{"id": f"{n}-0", "inputs": {"q": f"question {n}"}, "outputs": {"answer": n}} for n in range(RUNS)]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "question.txt").write_text("{q} is answered by {answer}.")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.seen, Server.answer = [], lambda number, text: (200, '{"score": 7}')
    yield tmp_path, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def scored(place, *flags, parallel=1):
    folder, url = place
    given = {"url": url, "model": "m", "template": folder / "question.txt", "parallel": parallel}
    named = [word for name, value in given.items() for word in (f"--judge.{name}", str(value))]
    dispatch(["score", "--runs", str(folder / "runs.jsonl"), "--output", str(folder / "scores.jsonl"), *named, *flags])


def lines(place):
    path = place[0] / "scores.jsonl"
    return list(read_lines(path)) if path.exists() else []


def failure(capsys, place, *flags, **settings):
    """The line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        scored(place, *flags, **settings)
    assert stop.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("parallel", [1, 4, 100])
def test_every_run_gets_its_own_score(place, monkeypatch, parallel):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Server.answer = lambda number, text: (200, f"Score: {int(text.split('by ')[1].split('.')[0]) / 2}")
    scored(place, parallel=parallel)
    assert {row["id"]: row["score"] for row in lines(place)} == {f"{n}-0": n / 2 for n in range(RUNS)}
    assert {(path, key) for path, _, key in Server.seen} == {("/v1/chat/completions", "Bearer secret")}
    assert {body["model"] for _, body, _ in Server.seen} == {"m"}


def test_what_a_judge_is_asked(place):
    scored(place, "--judge.range", "1", "9", "--judge.max-tokens", "50")
    body = Server.seen[0][1]
    assert (body["temperature"], body["max_tokens"]) == (0.0, 50)
    text = body["messages"][0]["content"]
    assert text.startswith("question 0 is answered by 0.\n\nThe score is a number from 1 to 9.")
    assert text.endswith('{"score": 1}.')
    (place[0] / "scores.jsonl").unlink()
    scored(place, "--judge.answer", "last_number", "--judge.temperature", "null")
    body = Server.seen[-1][1]
    assert body == {"model": "m", "messages": [{"role": "user", "content": "question 11 is answered by 11."}]}


def test_images_are_sent_as_images(tmp_path):
    (tmp_path / "question.txt").write_text("{picture} or {pictures} for {q}?")
    judge = make_judge(JudgeConfig("http://localhost", "m", str(tmp_path / "question.txt")), "judge")
    image = np.zeros((2, 2, 3), np.float32)
    asked = judge._question({"q": "one", "picture": image, "pictures": [image, image], "other": image})
    text, *images = asked["messages"][0]["content"]
    assert text["text"].startswith("(image) or (image) for one?")
    assert [part["image_url"]["url"][:22] for part in images] == ["data:image/png;base64,"] * 3


def test_scores_are_kept_when_a_later_run_fails(place, capsys):
    """Those that came before and beside it; given again the command asks for the others alone."""
    Server.answer = lambda number, text: (401, "no") if number > 5 else (200, "7")
    assert "refuses: 401 'no'" in failure(capsys, place, parallel=4)
    kept = [row["id"] for row in lines(place)]
    assert len(set(kept)) == len(kept) == 5
    Server.seen, Server.answer = [], lambda number, text: (200, "3")
    scored(place, parallel=4)
    assert len(Server.seen) == RUNS - 5
    assert sorted(row["score"] for row in lines(place)) == [3.0] * (RUNS - 5) + [7.0] * 5


def test_runs_without_a_score_are_counted_by_kind(place, capsys):
    answers = {2: (200, "very good"), 3: (200, "11"), 5: (200, "good"), 7: (400, "too long")}
    Server.answer = lambda number, text: answers.get(number, (200, "7"))
    scored(place, "--on-error", "skip")
    assert "4 of 12 runs have no score: the answer had no score: 2, " in capsys.readouterr().err
    failed = {row["id"]: row["error"] for row in lines(place) if "error" in row}
    assert list(failed) == ["1-0", "2-0", "4-0", "6-0"]
    assert failed["2-0"].startswith("run 2-0: the judge's score is 11")
    Server.seen, Server.answer = [], lambda number, text: (200, "very good")
    said = failure(capsys, place, "--judge.max-tokens", "9")
    assert "run 1-0: the judge's answer has no score; it ends with 'very good'" in said
    for row in (place[0] / "scores.jsonl", place[0] / "scores.jsonl.json"):
        row.unlink()
    said = failure(capsys, place, "--on-error", "skip")
    assert "none of the first 12 runs has a score (the answer had no score: 12)" in said


def test_a_judge_that_samples_is_asked_again_for_a_score(place, capsys):
    Server.answer = lambda number, text: (200, "7" if number % 2 == 0 else "I wonder")
    scored(place, "--judge.temperature", "0.5", "--judge.retries", "1")
    assert len(Server.seen) == 2 * RUNS
    Server.seen = []
    (place[0] / "scores.jsonl").unlink()
    assert "has no score; it ends with 'I wonder'" in failure(capsys, place, "--judge.temperature", "0")
    assert len(Server.seen) == 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--judge.range", "0", "100"), "judge.range"),
        (("--judge.answer", "last_number"), "judge.answer"),
        (("--judge.temperature", "1"), "judge.temperature"),
        (("--judge.model", "n"), "judge.model"),
    ],
)
def test_scores_of_another_kind_are_not_mixed(place, capsys, flags, field):
    scored(place)
    assert f"is of another run ({field} was " in failure(capsys, place, *flags)
    # What does not change a score may change.
    scored(place, "--judge.timeout", "9", "--judge.retries", "1", "--judge.max-tokens", "9")
    assert len(Server.seen) == RUNS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge.url", "localhost:8000"), "begin it with http:// or https://"),
        (("--judge.url", ""), "a judge needs url, model and template"),
        (("--judge.range", "5", "1"), "judge.range is 5.0 1.0: give the lowest score"),
        (("--judge.timeout", "0"), "--judge.timeout is '0': give a number above 0"),
        (("--scorer", "builtins:len"), "give either --scorer or --judge.url"),
        (("--judge.template", "nowhere.txt"), "--judge.template nowhere.txt does not exist"),
    ],
)
def test_a_judge_that_cannot_be_asked(place, capsys, flags, message):
    assert message in failure(capsys, place, *flags)
    assert Server.seen == []


def test_ctrl_c_ends_what_waits_and_keeps_what_is_there(place, capsys, monkeypatch):
    """In the middle of requests that hang, and of waits before the next try."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 30.0)
    hung = threading.Event()

    def answer(number, text):
        if number <= 3:
            return 200, "7"
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        if number == 4:
            return 500, "busy"
        hung.wait(10)
        return 200, "7"

    Server.answer = answer
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        scored(place, parallel=3)
    assert stop.value.code == 130
    assert time.monotonic() - began < 5
    hung.set()
    assert len(lines(place)) == 3
    assert "interrupted: what was finished is kept" in capsys.readouterr().err


def test_results_come_as_they_are_there_and_the_rest_is_cancelled():
    """One that takes long does not hold up the others; a failure comes behind what is there beside it."""
    begun, cancelled = [], []

    async def call(item):
        begun.append(item)
        try:
            await asyncio.sleep({"long": 60}.get(item, 0))
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        if item == "bad":
            raise ValueError
        return item

    with asyncio.Runner() as runner:
        assert sorted(as_completed(runner, call, ["a", "b"], 2)) == ["a", "b"]
        found = as_completed(runner, call, ["long", "c", "d", "e", "bad", "f", "never"], 2)
        assert [next(found), next(found), next(found)] == ["c", "d", "e"]
        with pytest.raises(ValueError):
            next(found)
    assert cancelled == ["long"]
    assert "never" not in begun


def test_scores_of_an_evaluation(place, caplog):
    """Kept as they come; those without one are counted by kind."""
    folder, url = place
    judge = make_judge(JudgeConfig(url, "m", str(folder / "question.txt")), "judge")
    runs = {name: {"q": str(n), "answer": n} for n, name in enumerate("abcd")}
    kept: dict[str, float] = {}
    Server.answer = lambda number, text: (200, "none" if text.startswith("2") else text[0])
    score_runs(judge, list(runs), runs.__getitem__, 4, True, kept.__setitem__)
    assert kept == {"a": 0.0, "b": 1.0, "d": 3.0}
    assert "1 of 4 runs have no score (the answer had no score: 1); the last: run c: " in caplog.text
    kept.clear()
    with pytest.raises(ScoreError, match="run c: the judge's answer has no score"):
        score_runs(judge, list(runs), runs.__getitem__, 1, False, kept.__setitem__)
    assert kept == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{q}\n{answr}", r"question.txt, line 2: \{answr\} is no value of run 0-0 of .*: did you mean \{answer\}\?"),
        ("{q}\n\n{0}", r"line 3: \{0\} is no value of"),
        ("{}", r"line 1: \{\} is no value of"),
        ('Rate {q}.\nAnswer {"score": 7}', r"line 2: \{\"score\": 7\} is no value of .* stand for braces"),
        ("{q}\n{answer", r"line 2: expected '\}' before end of string: write \{\{ and \}\} for braces"),
        ("{q}\n}", r"line 2: Single '\}' encountered"),
        ("{q!x}\n{answer}", r"run 0-0: .*question.txt, line 1: \{q!x\} failed \(ValueError"),
        ("{q}\n{answer:%}{q:d}", r"line 2: \{q:d\} failed \(ValueError: Unknown format code 'd'"),
        ("{q.nothing}", r"line 1: \{q.nothing\} failed \(AttributeError"),
        ("{answer:{wide}}", r"line 1: \{answer:\{wide\}\} failed \(KeyError: 'wide'"),
        ("Is it good?", "names no value of a run"),
        ("", "names no value of a run"),
    ],
)
def test_a_template_that_fails_is_named_with_its_place(place, capsys, text, message):
    (place[0] / "question.txt").write_text(text)
    assert re.search(message, failure(capsys, place))
    assert Server.seen == []


def test_a_template_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 {q}")
    (tmp_path / "marked.txt").write_bytes("\ufeff{q}".encode())
    assert read_template(str(tmp_path / "marked.txt"), "judge.template").text == "{q}"
    for path, message in ((tmp_path / "latin.txt", "is not UTF-8 text"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=f"judge.template .* {message}"):
            read_template(str(path), "judge.template")


class Ends:
    def __format__(self, specification):
        raise SystemExit(0)


def test_a_value_whose_text_fails():
    template = Template("question.txt", "One\n{answer}")
    with pytest.raises(ScoreError, match=r"question.txt, line 2: \{answer\} failed \(sys.exit\(0\)\)"):
        template.filled({"answer": Ends()})


def test_the_templates_of_an_evaluation_name_values_of_the_system(tmp_path):
    (tmp_path / "question.txt").write_text("{x}: {y}")
    judge = make_judge(JudgeConfig("http://localhost", "m", str(tmp_path / "question.txt")), "evaluation.judge")
    check_scorer(judge, ("x", "y"), "the system")
    check_scorer(len, (), "the system")
    with pytest.raises(ConfigError, match=r"question.txt, line 1: \{y\} is no value of the system: there are x, z"):
        check_scorer(judge, ("x", "z"), "the system")
