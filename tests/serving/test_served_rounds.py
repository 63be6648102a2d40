"""Online rounds by the command, sampled by a server: what it is given after each round, stops, and what is wrong."""

import re
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs import serving as runs_serving
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.run import assemble, round_store
from sysdpo_jax.runs.runs_file import read_lines
from tests.cli.test_runs import failure
from tests.components.stubs import WORDS
from tests.pretrained.checkpoints import write_decoder
from tests.serving.torch_server import TorchServer, serving

ROUNDS = 2
# Texts of a round, and of an evaluation.
MADE, MEASURED = 4 * 4, 2 * 2


class Left(BaseException):
    """As when a process is killed: nothing catches it."""


class Scorer:
    """Prefers short texts. left: scores until it is killed."""

    left = float("inf")

    @classmethod
    def score(cls, run):
        cls.left -= 1
        if cls.left < 0:
            raise Left
        return -float(len(run["answer"]))


def score(run):
    return Scorer.score(run)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_decoder(folder, "llama", num_hidden_layers=1, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Compiled programs, for all tests."""
    return tmp_path_factory.mktemp("compiled")


def write(folder, url, checkpoint, caches, mode="lora", model="base"):
    """The configuration of a run with a server."""
    (folder / "prompts.txt").write_text("".join(f"{WORDS[row]} {WORDS[row + 1]}\n" for row in range(4)))
    (folder / "held_out.txt").write_text("".join(f"{WORDS[row]} {WORDS[row + 2]}\n" for row in range(2)))
    writer = {
        "checkpoint": str(checkpoint),
        "mode": mode,
        "lora": {"rank": 2, "targets": ["attention", "mlp"]},
        "settings": {"max_prompt_length": 16, "max_new_tokens": 6},
    }
    config = {
        "directory": str(folder / "run"),
        "system": {
            "inputs": ["question"],
            "nodes": {"answer": {"component": "writer", "parents": ["question"]}},
            "components": {"writer": writer},
        },
        "serve": {"writer": {"url": url, "model": model, "retries": 2}},
        "schedule": {"steps": 4, "batch_size": 2, "warmup": 1, "learning_rate": 0.05},
        "evaluation": {"prompts": str(folder / "held_out.txt"), "scorer": f"{__name__}:score", "samples": 2},
        "online": {"prompts": str(folder / "prompts.txt"), "rounds": ROUNDS, "samples": 4, "batch_size": 8},
        "prepared_cache": str(folder / "prepared"),
        "compilation_cache": str(caches),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


@pytest.fixture
def written(model, tmp_path, caches, monkeypatch):
    """Writes one in the folder of the test. What this process knows of servers is forgotten at the end."""
    monkeypatch.setattr(Scorer, "left", float("inf"))
    monkeypatch.setattr("sysdpo_jax.endpoint.FIRST_WAIT", 0.01)
    yield lambda url, **settings: write(tmp_path, url, model, caches, **settings)
    runs_serving._handover.cache_clear()


def loads_of(server, path="/v1/load_lora_adapter"):
    return [body.get("lora_name") for asked, body in server.asked if asked == path]


def asked_of(server):
    """The models that were asked for texts, one after the other."""
    return [body["model"] for path, body in server.asked if path == "/v1/completions"]


def rows_of(folder, number):
    return list(read_lines(folder / f"round-{number}" / "runs.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(model, caches, tmp_path_factory):
    """The folder of a run that nothing stops, what it said, and its server."""
    folder, server = tmp_path_factory.mktemp("undisturbed"), TorchServer(model)
    with serving(server) as url, redirect_stderr(StringIO()) as said:
        dispatch(["online", write(folder, url, model, caches)])
    runs_serving._handover.cache_clear()
    return folder / "run", said.getvalue(), server


def factors_after(folder, number, path):
    """Those of the checkpoint at the end of a round, in PEFT's file; of 0 those that the run begins with."""
    run = assemble(read_config(folder / "config.yaml"))
    store, params = round_store(run), run.params
    for each in range(1, number + 1):
        params, _ = store.restored_round(each, run.params, params)
    sj.pretrained.save_adapter(path, run.system.node("answer").component, params["writer"], "base")
    return load_file(path / "adapter_model.safetensors")


def test_each_round_is_sampled_with_the_parameters_of_the_round_before(undisturbed, tmp_path):
    folder, said, server = undisturbed
    asked = asked_of(server)
    names = list(dict.fromkeys(asked))
    # A round's texts and the evaluation of the parameters that they are from; the last ones are evaluated alone.
    assert [asked.count(name) for name in names] == [MADE + MEASURED] * ROUNDS + [MEASURED]
    assert asked == sorted(asked, key=names.index)
    assert loads_of(server) == names
    for number, name in enumerate(names):
        wanted = factors_after(folder, number, tmp_path / str(number))
        assert wanted.keys() == server.taken[name].keys()
        for leaf, factor in wanted.items():
            np.testing.assert_array_equal(server.taken[name][leaf].numpy(), factor)
        if number:
            before = server.taken[names[number - 1]]
            assert all((before[leaf] != own).any() for leaf, own in server.taken[name].items())
    # The ids in the files of rounds are those that the server sampled with these parameters.
    for number in range(1, ROUNDS + 1):
        texts = [tuple(row["outputs"]["answer"]["tokens"]) for row in rows_of(folder, number)]
        assert len(texts) == MADE
        assert set(texts) <= server.sampled[names[number - 1]]
    # The last adapter is all that is kept.
    assert [path.name for path in (folder / "served").iterdir()] == names[-1:]
    assert server.models.keys() == {"base", names[-1]}
    gaps = [float(gap) for gap in re.findall(r"round \d, runs 16/16  server (\S+) nats a token from writer", said)]
    assert len(gaps) == ROUNDS
    assert max(gaps) < 1e-4


def test_whole_weights_go_from_round_to_round(model, written, tmp_path):
    server = TorchServer(model)
    with serving(server) as url:
        dispatch(["online", written(url, mode="full")])
    assert len(loads_of(server, "/collective_rpc")) == ROUNDS + 1
    assert set(asked_of(server)) == {"base"}
    # The server has them: they are as large as the model, and nobody reads them again.
    assert not list((tmp_path / "run" / "served").iterdir())


@pytest.mark.parametrize("scores", [3, MADE + MEASURED + MEASURED + 5], ids=["round 1", "round 2"])
def test_a_run_that_was_killed_goes_on_and_asks_for_nothing_twice(scores, undisturbed, model, written, tmp_path):
    """The next process hands over what the texts that are missing are from, and the rounds end as if undisturbed."""
    server, (folder, _, whole) = TorchServer(model), undisturbed
    with serving(server) as url:
        command = ["online", written(url)]
        Scorer.left = scores
        with pytest.raises(Left):
            dispatch(command)
        Scorer.left = float("inf")
        # As in another process: nobody knows what the server has.
        runs_serving._handover.cache_clear()
        dispatch(command)
    assert asked_of(server) == asked_of(whole)
    for number in range(1, ROUNDS + 1):
        assert rows_of(tmp_path / "run", number) == rows_of(folder, number)


def test_a_server_that_was_started_again_gets_the_adapter_again(undisturbed, model, written, tmp_path):
    server = TorchServer(model)
    plain, restarts = server.completions, [MEASURED + MADE + MEASURED + 5]

    def completions(body):
        # In the middle of round 2.
        if restarts and len(asked_of(server)) == restarts[0]:
            restarts.pop()
            server.models = {"base": server.models["base"]}
        return plain(body)

    server.completions = completions
    with serving(server) as url:
        dispatch(["online", written(url)])
    first, second, again, last = loads_of(server)
    assert second == again
    assert len({first, second, last}) == 3
    assert rows_of(tmp_path / "run", 2) == rows_of(undisturbed[0], 2)


@pytest.mark.parametrize(
    ("mode", "init_from", "began", "trained"),
    [
        ("lora", "", False, True),
        ("lora", "", True, False),
        ("frozen", "", False, False),
        # Not what its checkpoint holds.
        ("frozen", "runs/other", False, True),
    ],
)
def test_what_a_server_began_with_is_not_handed_over(mode, init_from, began, trained, model, written):
    config = replace(read_config(Path(written("http://127.0.0.1:9", mode=mode))), init_from=init_from)
    component, _ = sj.pretrained.load(model, max_prompt_length=8)
    system = sj.CompoundSystem(("question",), (sj.Node("answer", component, ("question",), params="writer"),))
    made = runs_serving.sampling_system(config, system, began)
    assert made.node("answer").component.handover.trained == trained


@pytest.mark.parametrize(
    ("kind", "mode", "said"),
    [
        (
            "not up",
            "lora",
            r"the server at http://127\.0\.0\.1:9 fails after 3 tries \(ConnectError.* it is started with .*reads /.*",
        ),
        ("other weights", "lora", r"differ by .* above max_gap 0\.05: serve the model that the run starts from"),
        ("no adapters", "lora", r"404 .*Not Found.* started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora"),
        ("no weights", "full", r"404 .*Not Found.* started with .*VLLM_SERVER_DEV_MODE=1"),
        ("other name", "full", r"The model `other` does not exist.*check serve\.writer\.url and serve\.writer\.model"),
    ],
)
def test_what_is_wrong_with_a_server_is_said(kind, mode, said, model, written, capsys):
    server = TorchServer(model)
    if kind == "other weights":
        server.models["base"].lm_head.weight.data *= 3
        server._read = lambda folder: deepcopy(server.models["base"])
    server.lacks = {"no adapters": "load_lora_adapter", "no weights": "collective_rpc"}.get(kind)
    with serving(server) as url:
        where, name = {"not up": "http://127.0.0.1:9"}.get(kind, url), {"other name": "other"}.get(kind, "base")
        found = failure(capsys, dispatch, ["online", written(where, mode=mode, model=name)])
    assert re.search(said, found), found
