"""Remote models and servers in a configuration: fields, commands, and where the key is not."""

import json
import re

import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.run import assemble
from sysdpo_jax.runs.serving import sampling_system
from sysdpo_jax.runs.system import build_system
from sysdpo_jax.runs.system_config import as_dict
from tests.components.test_remote import SECRET, Answers, assert_nowhere, serving


def table():
    return sj.Categorical(2, parent_sizes=(2,))


def config(url, cache, **node):
    remote = {"url": url, "model": "m", "cache": str(cache), **node.pop("remote", {})}
    nodes = {
        "route": {"component": "router", "parents": ["q"]},
        "said": {"remote": remote, "parents": ["text", "route"], "prompt": "{text} by {route}", **node},
    }
    components = {"router": {"factory": "tests.cli.test_remote_config:table", "mode": "full"}}
    return {"system": {"inputs": ["q", "text"], "nodes": nodes, "components": components}}


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("sysdpo_jax.endpoint.FIRST_WAIT", 0.01)


def test_rollouts_ask_once_and_write_no_key(tmp_path):
    """The command makes the runs, again asks for nothing, and leaves out what is refused for good."""
    answers = Answers({"429": 0.2, "cut": 0.1})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"q": row % 2, "text": f"question {row}"}) + "\n" for row in range(6)))
    with serving(answers) as url:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config(url, tmp_path / "answers.sqlite")))
        for output in ("runs.jsonl", "again.jsonl"):
            command = ["rollout", "--system", str(file), "--prompts", str(prompts), "--samples", "2"]
            dispatch([*command, "--output", str(tmp_path / output), "--compilation-cache", "none"])
        assert len(answers.delivered) == 12
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 12
    for run in runs:
        assert run["outputs"]["said"] == f"{run['inputs']['text']} by {run['outputs']['route']}".upper()
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "runs.jsonl").read_text()
    assert_nowhere(tmp_path, SECRET)


def test_a_question_that_is_refused_leaves_the_complete_runs(tmp_path, capsys):
    """Of a file that is begun, those of its own chunk too; the command goes on when the question is let through."""

    class Strict(Answers):
        strict = True

        def answer(self, body):
            if self.strict and "question 3" in body["messages"][-1]["content"]:
                return {"error": {"message": "not that", "code": 400}}
            return super().answer(body)

    answers, prompts = Strict(), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"q": row % 2, "text": f"question {row}"}) + "\n" for row in range(6)))
    with serving(answers) as url:
        file, output = tmp_path / "run.yaml", tmp_path / "runs.jsonl"
        file.write_text(yaml.safe_dump(config(url, tmp_path / "answers.sqlite")))
        command = ["rollout", "--system", str(file), "--prompts", str(prompts), "--samples", "2", "--chunk", "2"]
        command += ["--output", str(output), "--compilation-cache", "none"]
        with pytest.raises(SystemExit):
            dispatch(command)
        assert re.search(r"prompt 4, sample [12]: node 'said': the model 'm' at .*not that", capsys.readouterr().err)
        names = [json.loads(line)["id"] for line in output.read_text().splitlines()]
        assert names == [
            "0-0",
            "0-1",
            "1-0",
            "1-1",
            "2-0",
            "2-1",
        ]
        answers.strict = False
        dispatch(command)
    assert len(output.read_text().splitlines()) == 12
    assert len(answers.delivered) == 12 + 2


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"remote": {"url": "nowhere"}}, r"system\.nodes\.said\.remote: .*begin it with http"),
        ({"remote": {"key": "sk-0123456789"}}, r"said\.remote: its key is no name of an environment variable: put"),
        ({"remote": {"model": ""}}, r"system\.nodes\.said\.remote: .*has no name"),
        ({"weight": 2.0}, r"system\.nodes\.said is a remote model, which has no weight"),
        ({"retries": 2}, r"system\.nodes\.said is a remote model, which has no retries"),
        ({"tool": "a:b"}, r"system\.nodes\.said: give either"),
        ({"prompt": "{none}"}, "none"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(node, said, tmp_path):
    given = config("http://127.0.0.1:9/v1", tmp_path / "answers.sqlite", **node)
    with pytest.raises(ConfigError, match=said):
        build_system(from_mapping(TrainConfig, given), sj.make_mesh())


def test_how_it_is_asked_may_change(tmp_path):
    one = config("http://h/v1", tmp_path / "a", remote={"max_calls": 3, "concurrency": 2, "key": "K"})
    other = config("http://h/v1", tmp_path / "b")
    cold = config("http://h/v1", tmp_path / "b", remote={"temperature": 0.0})
    systems = [as_dict(from_mapping(TrainConfig, each).system) for each in (one, other, cold)]
    assert systems[0] == systems[1]
    assert systems[1] != systems[2]


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"writer": {"url": "http://h", "model": "m"}}, "serve.writer is no component: did you mean 'router'"),
        ({"router": {"url": "http://h"}}, r"serve\.router: a server needs url and model"),
        ({"router": {"url": "http://h", "model": "m"}}, "serve: a server samples for language models alone"),
    ],
)
def test_servers_that_cannot_be(serve, said, tmp_path):
    given = config("http://h/v1", tmp_path / "a") | {"serve": serve, "directory": str(tmp_path)}
    whole = from_mapping(TrainConfig, given)
    system, _ = build_system(whole, sj.make_mesh())
    with pytest.raises(ConfigError, match=said):
        sampling_system(whole, system)
    # Before anything is trained, whether anything is sampled or not.
    with pytest.raises(ConfigError, match=said):
        assemble(whole)
