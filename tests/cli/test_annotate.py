"""People's preferences: what the page shows and hides, what is kept, and what is refused."""

import html
import http.client
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

import sysdpo_jax as sj
from sysdpo_jax.annotation.answers import Answers, answers_of
from sysdpo_jax.annotation.comparisons import compare
from sysdpo_jax.annotation.server import LONGEST, AskingServer
from sysdpo_jax.cli.annotate import Config, ask
from sysdpo_jax.cli.ending import Terminated
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs.runs_file import read_lines
from tests.cli.test_runs import SYSTEM, failure, files, roll_out

__all__ = ["files"]
EVIL = "<script>alert('it ran')</script>&amp;"


def sampled(text, *tokens):
    return {"text": text, "tokens": list(tokens), "end": "end", "tokenizer": "5a0c"}


def write(path, said, prompts=4, samples=2, picture=None):
    """Runs of a drafter and a writer. said: what the answers begin with."""
    lines = []
    for prompt in range(prompts):
        for sample in range(samples):
            name = f"{prompt}-{sample}"
            draft = sampled(f"draft {prompt}", 7, prompt)
            outputs = {"draft": draft, "answer": sampled(f"{said} {name} {EVIL}", 1, prompt, sample)}
            if picture is not None:
                outputs["picture"] = f"{path.stem}_images/{name}-picture.png"
                (path.parent / f"{path.stem}_images").mkdir(exist_ok=True)
                grey = np.full((4, 6, 3), (picture + 10 * prompt + sample) % 256, np.uint8)
                Image.fromarray(grey).save(path.parent / outputs["picture"])
            lines.append({"id": name, "inputs": {"question": f"question {prompt} {EVIL}"}, "outputs": outputs})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@contextmanager
def serving(output, *paths, seed=0, nodes=()):
    found = compare(paths, nodes, seed).found
    answers = Answers(output, found, {"runs": "these", "annotator": "Ann"})
    with AskingServer(found, answers, nodes, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def request(server, method="GET", path="/", fields=None, **headers):
    """(status, headers, body) of a request as a browser sends it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    body = None if fields is None else urlencode(fields)
    kind = {"Content-Type": "application/x-www-form-urlencoded"} if fields else {}
    connection.request(method, path, body, kind | headers)
    response = connection.getresponse()
    found = response.status, dict(response.headers), response.read()
    connection.close()
    return found


def hidden(page):
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


def opened(server):
    status, _, body = request(server)
    assert status == 200
    return body.decode()


def say(server, answer, page=None, **changes):
    """Press a button of the page."""
    fields = hidden(page or opened(server)) | {"answer": answer} | changes
    return request(server, "POST", fields=fields)


def texts(page):
    """The answers of the page, from left to right."""
    return re.findall(r"(\w+ \d+-\d) ", html.unescape(page))


def rows(path):
    return list(read_lines(path))


def test_answers_become_whole_preferences_that_train_reads(tmp_path):
    path, output = write(tmp_path / "runs.jsonl", "said", picture=100), tmp_path / "elsewhere" / "preferences.jsonl"
    output.parent.mkdir()
    runs = {run["id"]: run for run in rows(path)}
    with serving(output, path) as server:
        for number, answer in enumerate(("left", "right", "tie", "skip"), 1):
            page = opened(server)
            left, right = (name.removeprefix("said ") for name in texts(page))
            assert f"Pair {number} of 4" in page
            status, headers, _ = say(server, answer, page)
            assert (status, headers["Location"]) == (303, "/")
            if number < 3:
                chosen, rejected = (left, right) if answer == "left" else (right, left)
                wanted = [runs[name]["outputs"] for name in (chosen, rejected)]
                wanted = [each | {"picture": f"../{each['picture']}"} for each in wanted]
                # On disk at once, tokens and all.
                assert rows(output)[-1] == {
                    "inputs": runs[left]["inputs"],
                    "chosen": wanted[0],
                    "rejected": wanted[1],
                }
            assert len(rows(output)) == min(number, 2)
        assert "Every pair is answered" in opened(server)
    said = rows(answers_of(output))
    assert [line["answer"] for line in said] == ["left", "right", "tie", "skip"]
    assert all(line["annotator"] == "Ann" and line["seconds"] >= 0 for line in said)
    [record, _] = sj.load_preferences(output)
    assert record.chosen["answer"].tokens in {(1, prompt, sample) for prompt in range(4) for sample in range(2)}


def test_runs_of_a_rollout_become_preferences_of_their_system(files):
    """Pictures, a tool's texts and routes: what was said of them is what the system's records hold."""
    path, output = roll_out(files), files / "pairs" / "preferences.jsonl"
    output.parent.mkdir()
    with serving(output, path) as server:
        for place in range(3):
            pair = server.comparisons[place]
            assert say(server, "right")[0] == 303
            row = rows(output)[place]
            assert row["chosen"]["route"] == pair.right.run["outputs"]["route"]
            assert (output.parent / row["chosen"]["image"]).is_file()
    assert len(sj.load_preferences(output, SYSTEM)) == 3


def test_the_page_obeys_nothing_that_a_run_says(tmp_path):
    path = write(tmp_path / "runs.jsonl", "said")
    with serving(tmp_path / "preferences.jsonl", path) as server:
        _, headers, body = request(server)
    page = body.decode()
    # Once in the question, and once on each side.
    assert page.count(html.escape(EVIL).replace("&#x27;", "&#39;")) == 3
    assert "<script>alert" not in page
    [nonce] = set(re.findall(r'nonce="([^"]+)"', page))
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"""(?:src|href|action)=["']?(?:https?:|//)""", page)


def test_nothing_tells_which_system_made_a_run(tmp_path):
    """Sides are a fair coin, and the same runs under other names give the same bytes."""
    folders = [tmp_path / "one", tmp_path / "other"]
    seen, lefts = [], 0
    for folder, names in zip(folders, (("oldest", "newest"), ("alpha", "omega")), strict=True):
        folder.mkdir()
        paths = [
            write(folder / f"{name}.jsonl", said, 40, 1, grey)
            for name, said, grey in zip(names, ("first", "second"), (10, 11), strict=True)
        ]
        pages, output = [], folder / "preferences.jsonl"
        with serving(output, *paths) as server:
            for _ in range(40):
                page = opened(server)
                assert {text.split()[0] for text in texts(page)} == {"first", "second"}
                lefts += texts(page)[0].startswith("first")
                sources = re.findall(r'<img[^>]* src="([^"]+)"', page)
                images = [request(server, path=source) for source in sources]
                assert [status for status, _, _ in images] == [200, 200]
                everything = [page.replace(server.token, "")] + [f"{h}{b}" for _, h, b in images]
                found = "".join(everything)
                assert not any(word in found for word in (*names, "jsonl", "_images", folder.name + "/"))
                pages.append(re.sub(r'nonce="[^"]+"|\d+:\d+:\d+', "", found))
                say(server, "left", page)
        seen.append(pages)
    assert seen[0] == seen[1]
    # Of 40 fair coins, both times the same ones: outside of 8 to 32 with probability 1e-4.
    assert 8 <= lefts // 2 <= 32


def test_another_seed_has_other_sides_and_another_order(tmp_path):
    path = write(tmp_path / "runs.jsonl", "said", 20)
    orders = {seed: [(each.left.name, each.right.name) for each in compare([path], (), seed).found] for seed in (0, 1)}
    assert orders[0] == [(each.left.name, each.right.name) for each in compare([path], (), 0).found]
    assert {tuple(sorted(pair)) for pair in orders[0]} == {tuple(sorted(pair)) for pair in orders[1]}
    assert {*orders[0]} != {*orders[1]}
    assert [sorted(pair) for pair in orders[0]] != [sorted(pair) for pair in orders[1]]


def test_every_prompt_comes_before_one_comes_again(tmp_path):
    found = compare([write(tmp_path / "runs.jsonl", "said", 5, 3)], (), 0).found
    prompts = [each.left.run["id"].split("-")[0] for each in found]
    assert len(found) == 15
    assert all({*prompts[start : start + 5]} == {*"01234"} for start in (0, 5, 10))


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    """With half a line of an answer, and without the preferences."""
    path, output = write(tmp_path / "runs.jsonl", "said"), tmp_path / "preferences.jsonl"
    with serving(output, path) as server:
        say(server, "left")
        say(server, "tie")
        say(server, "right")
        third, before = opened(server), output.read_bytes()
    answers = answers_of(output)
    answers.write_bytes(answers.read_bytes() + b'{"id": "half')
    output.unlink()
    with serving(output, path) as server:
        assert output.read_bytes() == before
        page = opened(server)
        assert "Pair 4 of 4" in page
        assert texts(page) == texts(third)


def test_answers_are_taken_back_one_by_one(tmp_path):
    path, output = write(tmp_path / "runs.jsonl", "said"), tmp_path / "preferences.jsonl"
    with serving(output, path) as server:
        first = opened(server)
        assert re.search('value="undo"[^>]* disabled', first)
        for _ in range(4):
            say(server, "left")
        assert len(rows(output)) == 4
        for left in (3, 2, 1, 0):
            say(server, "undo")
            assert len(rows(output)) == left
        assert texts(opened(server)) == texts(first)
        assert say(server, "undo")[0] == 303
        say(server, "right")
    with serving(output, path) as server:
        assert "Pair 2 of 4" in opened(server)
        [row] = rows(output)
        assert row["chosen"]["answer"]["text"].startswith(texts(first)[1])


def test_two_windows_do_not_answer_for_each_other(tmp_path):
    path, output = write(tmp_path / "runs.jsonl", "said"), tmp_path / "preferences.jsonl"
    with serving(output, path) as server:
        page = opened(server)
        assert say(server, "left", page)[0] == 303
        for answer in ("right", "undo"):
            status, _, body = say(server, answer, page)
            assert status == 409
            assert "answered in another window" in body.decode()
            assert "Pair 2 of 4" in body.decode()
        done = [threading.Thread(target=say, args=(server, "left", opened(server))) for _ in range(8)]
        for thread in done:
            thread.start()
        for thread in done:
            thread.join()
        assert len(rows(output)) == len(rows(answers_of(output))) == 2


@pytest.mark.parametrize(
    ("headers", "changes", "status"),
    [
        ({"Host": "evil.example"}, {}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, {}, 403),
        ({}, {"token": ""}, 403),
        ({}, {"token": "guess\N{SNOWMAN}"}, 403),
        ({}, {"answer": "both"}, 400),
        ({}, {"pair": "another"}, 409),
        ({"Content-Length": str(LONGEST + 1)}, {}, 413),
        ({"Content-Length": "many"}, {}, 411),
    ],
    ids=lambda value: str(value)[:30],
)
def test_foreign_requests_change_nothing(tmp_path, headers, changes, status):
    path, output = write(tmp_path / "runs.jsonl", "said"), tmp_path / "preferences.jsonl"
    with serving(output, path) as server:
        assert server.server_address[0] == "127.0.0.1"
        fields = hidden(opened(server)) | {"answer": "left"} | changes
        assert request(server, "POST", fields=fields, **headers)[0] == status
        assert not output.exists()
        assert not answers_of(output).exists()
        if "Host" in headers:
            found = request(server, **headers)
            assert found[0] == 403
            assert b"question" not in found[2]
        for place in ("/runs.jsonl", "/../runs.jsonl", "/pictures/x/0", "//evil.example/"):
            assert request(server, path=place)[0] == 404


def test_values_of_all_kinds_are_shown(tmp_path):
    path = tmp_path / "runs.jsonl"
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "line one\n\nline two"}]
    shared = {"plan": {"steps": ["look", "answer"], "sure": True}, "score": 0.5, "nothing": "", "numbers": [1, 2.5]}
    runs = [
        {"id": "0-0", "inputs": {"chat": chat}, "outputs": shared | {"text": "short"}},
        {"id": "0-1", "inputs": {"chat": chat}, "outputs": shared | {"text": " \n", "extra": None}},
    ]
    path.write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    with serving(tmp_path / "preferences.jsonl", path) as server:
        page = opened(server)
    for wanted in ("<dt>user</dt>", "line one\n\nline two", "<li><pre>\nlook</pre></li>", "<code>true</code>"):
        assert wanted in page, wanted
    for wanted in ("<code>[1, 2.5]</code>", "(empty)", "(white space)", "(did not run)", "<code>null</code>"):
        assert wanted in page, wanted
    # Once for each of what both runs share.
    assert page.count("the same on both sides") == page.count('class="same"') == 4


def test_nodes_choose_what_is_shown_and_asked(tmp_path, capsys):
    path, output = write(tmp_path / "runs.jsonl", "said"), tmp_path / "preferences.jsonl"
    with serving(output, path, nodes=("answer",)) as server:
        assert "draft" not in opened(server)
        say(server, "left")
        assert {*rows(output)[0]["chosen"]} == {"draft", "answer"}
    flags = ["--output", str(output), "--export", "argilla", "--nodes"]
    said = failure(capsys, dispatch, ["annotate", str(path), *flags, "draft"])
    assert "no two runs of a prompt differ in what is shown" in said
    assert "has no node 'anser': did you mean 'answer'?" in failure(
        capsys, dispatch, ["annotate", str(path), *flags, "anser"]
    )


def test_ctrl_c_ends_with_the_counts_and_what_comes_next(tmp_path, monkeypatch, capsys):
    """Of two files with the share of wins: here the first one wins 3 of 4, with a tie for the fourth."""
    paths = [write(tmp_path / f"{name}.jsonl", name, 4, 1) for name in ("before", "after")]
    output = tmp_path / "preferences.jsonl"

    def asked(server):
        threading.Thread(target=serve, args=(server, 0.01), daemon=True).start()
        for answer in ("first", "first", "first", "tie"):
            page = opened(server)
            left = texts(page)[0].startswith("before")
            say(server, "tie" if answer == "tie" else "left" if left else "right", page)
        server.shutdown()
        raise KeyboardInterrupt

    serve = AskingServer.serve_forever
    monkeypatch.setattr(AskingServer, "serve_forever", asked)
    dispatch(["annotate", *map(str, paths), "--output", str(output), "--annotator", "Ann"])
    said = capsys.readouterr().out
    assert re.search(r"open http://127\.0\.0\.1:\d+/ in a browser", said)
    assert "preferences.jsonl: 3 preferences, 1 ties, 0 skipped" in said
    # (3 + 0.5) / 4.
    assert re.search(r"before\.jsonl is preferred to .*after\.jsonl in 88% of 4 pairs \(95% interval", said)
    assert "too few prompts (n = 4" in said
    assert f"next: sysdpo train RECIPE_OR_FILE --data.source {output}" in said
    assert all(row["chosen"]["answer"]["text"].startswith("before") for row in rows(output))
    # The same command goes on; a person, a seed or runs of another kind are refused.
    monkeypatch.setattr(AskingServer, "serve_forever", lambda server: (_ for _ in ()).throw(Terminated()))
    config = Config(tuple(paths), output, "Ann")
    with pytest.raises(Terminated):
        ask(config, compare(paths, (), 0))
    assert "4 pairs, 4 of them answered" in capsys.readouterr().out
    flags = ["annotate", *map(str, paths), "--output", str(output)]
    assert "annotator was Ann, now Bob" in failure(capsys, dispatch, [*flags, "--annotator", "Bob"])
    assert "is made of" in failure(capsys, dispatch, [*flags, "--answers", "any.json"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["inputs"].update(question="another"), "the run '0-0' has other inputs in"),
        (lambda run: run.update(id=f"9{run['id']}"), "have no prompt in common: roll both systems out on the same"),
        (lambda run: run["outputs"].update(sketch=""), "are of different systems: "),
        (lambda run: run["outputs"].pop("draft"), "has no node 'draft': give runs of systems with the same nodes"),
        (
            lambda run: run["outputs"].update(picture="b_images/gone.png"),
            "a picture is not there: keep b_images beside",
        ),
        (lambda run: run.pop("outputs"), "the field 'outputs' must be an object: give a file of `sysdpo rollout`"),
        (lambda run: run.update(id="0-0"), "the run '0-0' is there twice"),
    ],
    ids=range(7),
)
def test_files_that_cannot_be_compared_are_refused(tmp_path, capsys, change, message):
    paths = [write(tmp_path / f"{name}.jsonl", name) for name in "ab"]
    changed = rows(paths[1])
    for run in changed:
        change(run)
    paths[1].write_text("".join(f"{json.dumps(run)}\n" for run in changed))
    output = tmp_path / "preferences.jsonl"
    flags = ["annotate", *map(str, paths), "--output", str(output)]
    assert message in failure(capsys, dispatch, flags)
    assert not output.exists()


def test_what_else_is_refused(tmp_path, capsys):
    path, output = write(tmp_path / "runs.jsonl", "said", 1, 1), tmp_path / "preferences.jsonl"
    flags = ["--output", str(output)]
    assert "no two runs of a prompt differ" in failure(capsys, dispatch, ["annotate", str(path), *flags])
    three = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    assert "3 files of runs: give one, or two" in failure(capsys, dispatch, ["annotate", *three, *flags])
    assert "a.jsonl does not exist" in failure(capsys, dispatch, ["annotate", three[0], *flags])
    path = write(tmp_path / "runs.jsonl", "said")
    said = failure(capsys, dispatch, ["annotate", str(path), "--output", str(path)])
    assert "runs.jsonl is a file that is read" in said
    # What another command wrote is not overwritten.
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    said = failure(capsys, dispatch, ["annotate", str(path), "--output", str(tmp_path / "pairs.jsonl")])
    assert "pairs.jsonl exists, and is not made of answers: name another output" in said
    assert (tmp_path / "pairs.jsonl").read_text() == "{}\n"
    with serving(tmp_path / "other.jsonl", path) as server:
        port = ["--port", str(server.server_port)]
        assert "cannot be had" in failure(capsys, dispatch, ["annotate", str(path), *flags, *port])
