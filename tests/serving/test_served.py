"""Texts that a server samples: transformers behind vLLM's endpoints on loopback, with the weights that it is given."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sysdpo_jax as sj
from sysdpo_jax import pretrained
from sysdpo_jax.serving import Handover, MismatchError, Server, ServingError, served
from sysdpo_jax.serving.engines import AnswerError, Settings, SGLang
from tests.components.stubs import word_tokenizer
from tests.pretrained.checkpoints import write_decoder
from tests.serving.torch_server import TorchServer, serving

PROMPTS = [{"x": text} for text in ("a red", "the small cube on", "a")]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_decoder(path, "llama", tie_word_embeddings=False)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return pretrained.load(folder, tokenizer=word_tokenizer(), max_prompt_length=8, max_new_tokens=6)


def system_of(component):
    return sj.CompoundSystem(("x",), (sj.Node("y", component, ("x",)),))


FACTORS = sj.LoRA(4, 8.0, ("attention", "mlp"))


def moved(tree, size):
    """LoRA as after training: both factors are drawn."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + size if path[-1].key == "lora_b" else leaf, tree)


def with_factors(params, size, seed=0):
    return moved(sj.add_lora(params, FACTORS, jax.random.key(seed)), size)


def handover(url, tmp_path, **settings):
    return Handover(Server(url, "base", **settings), tmp_path / "handed", "writer")


@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_texts_are_of_the_parameters_that_were_handed_over(kind, loaded, folder, tmp_path):
    """Transformers, with the factors that PEFT's files hold or the weights of the export, is 1e-4 nats a token away.

    Float32 on both sides; the parameters are not those that the server began with.
    """
    component, params = loaded
    own = with_factors(params, 0.1) if kind == "adapter" else jax.tree.map(lambda x: x * 1.1, params)
    server = TorchServer(folder)
    with serving(server) as url:
        given = handover(url, tmp_path)
        runs = sj.rollout(served(system_of(component), {"y": given}), {"y": own}, PROMPTS, KEY, samples=4)
    assert len(runs) == 12
    texts = [run["y"] for run in runs]
    # The ids are kept, and are those that the trainer reads: nothing is tokenized again.
    features = component.prepare(texts, {"x": [run["x"] for run in runs]})
    assert not features["retokenized"].any()
    assert [len(text.tokens) for text in texts] == features["completion"].sum(1).tolist()
    assert given.gap.tokens == sum(len(text.tokens) for text in texts)
    assert given.gap.mean < 1e-4
    assert given.gap.worst < 1e-3
    assert len({tuple(text.tokens) for text in texts}) > 3
    assert {text.end for text in texts} <= {"end", "cut"}


def test_a_prompt_reaches_the_server_as_the_ids_that_the_trainer_reads(loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        given.sample({"y": params}, PROMPTS, KEY)
    bodies = [body for path, body in server.asked if path == "/v1/completions"]
    tokens, lengths = component.prompt_tokens({"x": [row["x"] for row in PROMPTS]})
    wanted = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert sorted(body["prompt"] for body in bodies) == sorted(wanted)
    assert len({body["seed"] for body in bodies}) == 3
    assert all(body["stop_token_ids"] == [2] and body["temperature"] == 1.0 for body in bodies)


def test_the_same_key_asks_the_same(loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        first, second, other = (given.sample({"y": params}, PROMPTS, jax.random.key(seed)) for seed in (0, 0, 1))
    assert [run["y"].tokens for run in first] == [run["y"].tokens for run in second]
    assert [run["y"].tokens for run in first] != [run["y"].tokens for run in other]


def test_parameters_are_handed_over_once_until_they_change(loaded, folder, tmp_path):
    component, params = loaded
    first, second = with_factors(params, 0.1), with_factors(params, 0.2)
    server = TorchServer(folder)
    with serving(server) as url:
        given = handover(url, tmp_path)
        by_server = served(system_of(component), {"y": given})
        # Equal numbers in other arrays are the same parameters.
        for own in (first, first, jax.tree.map(jnp.array, first), second):
            by_server.sample({"y": own}, PROMPTS[:1], KEY)
    loads = [body["lora_name"] for path, body in server.asked if path == "/v1/load_lora_adapter"]
    unloads = [body["lora_name"] for path, body in server.asked if path == "/v1/unload_lora_adapter"]
    assert len(loads) == 2
    assert unloads == loads[:1]
    assert [path.name for path in (tmp_path / "handed").iterdir()] == loads[1:]


def test_weights_of_another_model_stop_the_run(loaded, folder, tmp_path):
    """A server that took the adapter's name but not its factors: the gap is seen on the first texts."""
    component, params = loaded
    server = TorchServer(folder)
    server.load_lora_adapter = lambda body: (
        server.models.update({body["lora_name"]: server.models["base"]}) or (200, {})
    )
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        with pytest.raises(MismatchError, match=r"differ by .* nats a token on \d+ tokens .* above max_gap 0.05"):
            sj.rollout(given, {"y": with_factors(params, 0.3)}, PROMPTS, KEY, samples=4)


def test_the_bound_is_on_the_mean(loaded, folder, tmp_path):
    """Noise on the server's logits: refused at the usual bound, borne and noted at a wider one."""
    component, params = loaded
    with serving(TorchServer(folder, noise=0.3)) as url:
        given = handover(url, tmp_path)
        with pytest.raises(MismatchError):
            served(system_of(component), {"y": given}).sample({"y": params}, PROMPTS * 4, KEY)
        served(system_of(component), {"y": given}, {"y": 5.0}).sample({"y": params}, PROMPTS * 4, KEY)
    assert 0.05 < given.gaps[-1].mean < 5.0


def test_sixteen_texts_of_a_large_call_are_compared(loaded, folder, tmp_path):
    """Of every prompt some."""
    component, params = loaded
    with serving(TorchServer(folder)) as url:
        given = handover(url, tmp_path)
        runs = sj.rollout(served(system_of(component), {"y": given}), {"y": params}, PROMPTS, KEY, samples=8)
    compared = {0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22}
    assert given.gap.tokens == sum(len(runs[row]["y"].tokens) for row in compared)
    assert given.gap.worst < 1e-3


def test_an_end_that_the_model_does_not_have_is_named(loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    plain = server.completions
    server.completions = lambda body: plain(body | {"stop_token_ids": list(range(3, 30))})
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        with pytest.raises(ServingError, match=r"ended a text at the token .* which is no end of the model"):
            given.sample({"y": params}, PROMPTS, KEY)


def test_faults_that_pass_are_asked_again(loaded, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sysdpo_jax.endpoint.FIRST_WAIT", 0.01)
    component, params = loaded
    server = TorchServer(folder)
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        given.sample({"y": params}, PROMPTS, KEY)
        server.fails = [(503, {"error": {"message": "busy"}}), (429, {"error": {"message": "slower"}})]
        again = given.sample({"y": params}, PROMPTS, KEY)
    assert len(again) == 3


@pytest.mark.parametrize(
    ("status", "said"), [(404, "the model does not exist"), (400, "max_tokens is too large"), (401, "no key")]
)
def test_faults_that_stay_name_the_server(status, said, loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        given.sample({"y": params}, PROMPTS, KEY)
        server.fails = [(status, {"error": {"message": said, "code": status}})] * 3
        with pytest.raises(ServingError, match=said):
            given.sample({"y": params}, PROMPTS, KEY)


def test_nobody_answers(loaded, tmp_path):
    component, params = loaded
    given = served(system_of(component), {"y": handover("http://127.0.0.1:9", tmp_path, retries=0)})
    with pytest.raises(ServingError, match=r"127\.0\.0\.1:9"):
        given.sample({"y": params}, PROMPTS, KEY)


def test_training_is_the_models_own(loaded, tmp_path):
    """The same log-probabilities and candidates, and no request."""
    component, params = loaded
    given = served(system_of(component), {"y": handover("http://127.0.0.1:9", tmp_path)})
    records = [{"x": "a red", "y": "ball"}]
    for system in (system_of(component), given):
        found = system.log_prob({"y": params}, system.prepare(records), KEY)["y"]
        np.testing.assert_allclose(
            found, component.log_prob(params, component.prepare(["ball"], {"x": ["a red"]}), KEY)
        )
    node = given.node("y")
    assert given.node_candidates(node, {"y": params}, {"x": ["a red"]}, 2, KEY)


def test_what_cannot_be_served_is_refused(loaded, tmp_path):
    component, _ = loaded
    given = handover("http://127.0.0.1:9", tmp_path)
    with pytest.raises(ServingError, match="'z' is nothing"):
        served(system_of(component), {"z": given})
    table = sj.CompoundSystem(("x",), (sj.Node("y", sj.Categorical(2, parent_sizes=(2,)), ("x",)),))
    with pytest.raises(ServingError, match="'y' is Categorical"):
        served(table, {"y": given})


def test_token_log_probs_are_what_log_prob_sums(loaded):
    component, params = loaded
    features = component.prepare(["ball", "small cube"], {"x": ["a red", "the"]})
    values, mask = component.token_log_probs(params, features)
    np.testing.assert_allclose((values * mask).sum(1), component.log_prob(params, features, KEY), rtol=1e-6)


def test_sglang_is_asked_by_its_own_words():
    """After its documentation of /generate: ids in, ids and log-probabilities out."""
    engine = SGLang()
    path, body = engine.completion("base", "a1", [5, 6], 7, Settings(4, 1.0, 1.0, (2,)))
    assert "lora_path" not in engine.completion("base", None, [5, 6], 7, Settings(4, 1.0, 1.0, (2,)))[1]
    assert path == "/generate"
    assert body["input_ids"] == [5, 6]
    assert body["lora_path"] == "a1"
    assert body["sampling_params"]["sampling_seed"] == 7
    assert body["return_logprob"] is True
    answer = {"output_ids": [8, 2], "meta_info": {"output_token_logprobs": [[-0.5, 8, None], [-1.5, 2, None]]}}
    answer["meta_info"]["finish_reason"] = {"type": "stop", "matched": 2}
    assert engine.read(json.loads(json.dumps(answer))) == ([8, 2], [-0.5, -1.5], True)
    with pytest.raises(AnswerError, match="2 tokens need as many"):
        engine.read({"output_ids": [8, 2], "meta_info": answer["meta_info"] | {"output_token_logprobs": [[-0.5, 8]]}})


def test_tied_heads_that_a_server_would_keep_are_refused(tmp_path):
    """VLLM 0.32 takes the embedding of other weights and keeps the head that was made of the old one."""
    write_decoder(tmp_path / "tied", "llama")
    component, params = pretrained.load(tmp_path / "tied", tokenizer=word_tokenizer(), max_prompt_length=8)
    given = handover("http://127.0.0.1:9", tmp_path)
    with pytest.raises(ServingError, match=r"keeps the old head .* train with LoRA"):
        served(system_of(component), {"y": given}).sample({"y": params}, PROMPTS, KEY)


def test_two_handovers_of_the_same_parameters(loaded, folder, tmp_path):
    """What one of them loaded is there for the other, whether or not the answer to an attempt came."""
    component, params = loaded
    own = with_factors(params, 0.1)
    server = TorchServer(folder)
    with serving(server) as url:
        for _ in range(2):
            given = handover(url, tmp_path)
            served(system_of(component), {"y": given}).sample({"y": own}, PROMPTS, KEY)
            assert given.gap.mean < 1e-4


def test_whole_weights_of_two_models_take_turns(loaded, folder, tmp_path):
    """A server has those of one at a time: who asks next hands over again, though its own parameters are the same."""
    component, params = loaded
    with serving(TorchServer(folder)) as url:
        both = [handover(url, tmp_path / name) for name in ("one", "two")]
        scaled = [jax.tree.map(lambda x, s=scale: x * s, params) for scale in (1.1, 1.2)]
        for given, tree in zip(both * 2, scaled * 2, strict=True):
            served(system_of(component), {"y": given}).sample({"y": tree}, PROMPTS, KEY)
            assert given.gaps[-1].mean < 1e-4


def spoken(x, turns):
    return " ".join([x, *(str(turn["said"]) for turn in turns)])


def is_over(turn):
    return not turn["said"].startswith("red")


def test_roles_and_turns_of_a_loop_by_one_server(loaded, folder, tmp_path):
    """Two roles of one base, one of which speaks in a loop that rows leave: each is sampled with its own factors."""
    component, params = loaded
    agent = replace(component, prompt=spoken, truncation="keep_end")
    loop = sj.Loop("turns", (sj.Node("said", agent, ("x", "turns"), params="agent", base="base"),), 3, is_over)
    answer = sj.Node("answer", component, ("x",), params="writer", base="base")
    system = sj.CompoundSystem(("x",), (loop, answer))
    roles = {"agent": 0.1, "writer": 0.2}
    trees = {"base": params} | {name: moved(sj.lora_factors(params, FACTORS, KEY), roles[name]) for name in roles}
    server = TorchServer(folder)
    with serving(server) as url:
        given = {name: Handover(Server(url, "base"), tmp_path / "handed", name) for name in roles}
        runs = served(system, given).sample(trees, PROMPTS * 3, KEY)
    assert len({len(run["turns"]) for run in runs}) > 1
    assert all(handover.gap.mean < 1e-4 for handover in given.values())
    loads = [body["lora_name"].split("-")[0] for path, body in server.asked if path == "/v1/load_lora_adapter"]
    assert sorted(loads) == sorted(roles)
    asked = [body["model"].split("-")[0] for path, body in server.asked if path == "/v1/completions"]
    assert asked.count("agent") == sum(len(run["turns"]) for run in runs)
    assert asked.count("writer") == len(runs)


def test_what_is_not_trained_is_not_handed_over(loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    with serving(server) as url:
        given = Handover(Server(url, "base"), tmp_path / "handed", "writer", trained=False)
        served(system_of(component), {"y": given}).sample({"y": params}, PROMPTS, KEY)
    assert {path for path, _ in server.asked} == {"/v1/completions"}
    assert not (tmp_path / "handed").exists()


def test_a_server_that_takes_no_adapters_is_told_what_it_needs(loaded, folder, tmp_path):
    component, params = loaded
    server = TorchServer(folder)
    server.lacks = "load_lora_adapter"
    with serving(server) as url:
        given = served(system_of(component), {"y": handover(url, tmp_path)})
        with pytest.raises(ServingError, match="is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora"):
            given.sample({"y": with_factors(params, 0.1)}, PROMPTS, KEY)
