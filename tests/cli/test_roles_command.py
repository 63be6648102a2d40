"""Three roles of one checkpoint by the commands: trained, gone on with, sampled from, exported, started from."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml

from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.models.lora import is_lora, merge_lora
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.run import assemble, load_system, restored
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.training import read_metrics
from sysdpo_jax.trees import by_path
from tests.cli.test_train import WORDS, red
from tests.pretrained.checkpoints import write_decoder

ROLES = ("writer", "critic", "editor")
STEPS = 3


def score(run):
    return red(run)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """One small model, preferences for red, prompts, and the configuration."""
    folder = tmp_path_factory.mktemp("material")
    write_decoder(folder / "model", "llama", num_hidden_layers=1, hidden_size=128)
    rng = np.random.default_rng(0)
    text = lambda *words: " ".join([*words, *rng.choice(WORDS[2:], 3)])  # noqa: E731
    side = lambda word: {"draft": text(), "remark": text(word), "answer": text(word)}  # noqa: E731
    rows = [{"inputs": {"question": text()}, "chosen": side("red"), "rejected": side("the")} for _ in range(40)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"{text()}\n" for _ in range(3)))
    role = {"base": "writer", "lora": {"rank": 2}}
    nodes = {
        "draft": {"component": "writer", "parents": ["question"]},
        "remark": {"component": "critic", "parents": ["draft"], "prompt": "{draft} on"},
        "answer": {"component": "editor", "parents": ["question", "remark"], "prompt": "{question} the {remark}"},
    }
    settings = {"max_prompt_length": 16, "max_new_tokens": 8}
    config = {
        "directory": str(folder / "run"),
        "system": {
            "inputs": ["question"],
            "nodes": nodes,
            "components": {
                "editor": role | {"settings": {"max_new_tokens": 6, "stop_tokens": [3]}, "learning_rate": 1e-3},
                "writer": {"checkpoint": str(folder / "model"), "lora": {"rank": 2}, "settings": settings},
                "critic": role,
            },
        },
        "data": {"source": str(folder / "pairs.jsonl")},
        "schedule": {"steps": STEPS, "batch_size": 8, "warmup": 1, "learning_rate": 1e-2},
        "evaluation": {"prompts": str(folder / "prompts.txt"), "scorer": f"{__name__}:score", "every": STEPS},
        "log_every": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(material):
    dispatch(["train", str(material / "run.yaml")])
    return material


def params_of(folder):
    run = assemble(read_config(folder / "config.yaml"))
    return run.system, restored(run, "newest")[0]


def test_only_factors_are_trained_and_weights_are_there_once(trained):
    rows = [row for row in read_metrics(trained / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert all(row[f"grad_norm/{role}"] > 0 for row in rows for role in ROLES)
    system, params = params_of(trained / "run")
    assert all(map(is_lora, by_path({name: params[name] for name in ("critic", "editor")})))
    components = {node.name: node.component for node in system.nodes}
    assert (components["remark"].max_new_tokens, components["answer"].max_new_tokens) == (8, 6)
    assert components["answer"].stop_tokens == (3,)
    start = assemble(read_config(trained / "run.yaml")).params
    for path, leaf in by_path(start).items():
        assert np.array_equal(leaf, by_path(params)[path]) != path.endswith(("lora_a", "lora_b")), path


def test_the_dry_run_counts_the_weights_once(material, tmp_path, capsys):
    dispatch(["train", str(material / "run.yaml"), "--directory", str(tmp_path / "run"), "--dry-run"])
    said = capsys.readouterr().out
    table = said.partition("MiB per device")[2].splitlines()
    held = {line.split()[0]: float(line.split()[1]) for line in table if line.startswith(ROLES)}
    assert set(held) == set(ROLES)
    assert held["critic"] == held["editor"] < 0.1 < held["writer"]
    assert "on writer" in said


def test_the_run_goes_on_as_one_that_was_never_stopped(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = [str(trained / "run.yaml"), "--schedule.steps", "4", "--evaluation.prompts", "", "--evaluation.scorer", ""]
    dispatch(["train", *flags, "--directory", str(tmp_path / "run")])
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [0, 1, 2, 3]


def test_the_run_is_a_system_to_sample_from(trained, tmp_path):
    flags = ["--prompts", str(trained / "prompts.txt"), "--samples", "1", "--output", str(tmp_path / "runs.jsonl")]
    dispatch(["rollout", "--system", str(trained / "run"), *flags])
    assert all(set(row["outputs"]) == {"draft", "remark", "answer"} for row in read_lines(tmp_path / "runs.jsonl"))


# peft 0.21 asks transformers for a name that version 5 deprecates.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_each_role_is_exported_as_an_adapter_of_the_base_or_whole(trained, tmp_path):
    """PEFT's model of the one base and transformers' whole one compute what the role does, to 1e-4 in float32."""
    from peft import PeftModel

    run = str(trained / "run")
    dispatch(["export", "--directory", run, "--output", str(tmp_path / "adapters"), "--adapters"])
    dispatch(["export", "--directory", run, "--output", str(tmp_path / "whole")])
    system, params = params_of(trained / "run")
    tokens, seen = np.array([[5, 6, 7, 8, 9]]), []
    for node, role in zip(("draft", "remark", "answer"), ROLES, strict=True):
        settings = json.loads((tmp_path / "adapters" / role / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(trained / "model")
        base = transformers.AutoModelForCausalLM.from_pretrained(trained / "model").eval()
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / role).eval()
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapters" / role)
        decoder = system.node(node).component.decoder
        found = np.asarray(decoder.apply({"params": system.node(node).tree(params)}, jax.numpy.asarray(tokens)))
        for theirs in (whole, adapted):
            with torch.no_grad():
                np.testing.assert_allclose(found, theirs(torch.tensor(tokens)).logits.numpy(), rtol=0, atol=1e-4)
        seen.append(found)
    assert min(np.abs(one - other).max() for one, other in zip(seen, [*seen[1:], seen[0]], strict=True)) > 1e-4


def configured(folder, target, change):
    config = yaml.safe_load((folder / "run.yaml").read_text()) | {"directory": str(target / "next")}
    change(config["system"]["components"], config)
    (target / "run.yaml").write_text(yaml.safe_dump(config))
    return read_config(target / "run.yaml")


def started(folder, target, change=lambda components, config: None):
    def both(components, config):
        config["init_from"] = str(folder / "run")
        change(components, config)

    return assemble(configured(folder, target, both)).params


def test_another_run_starts_from_the_roles(trained, tmp_path):
    """With their factors, frozen ones too; a role can become a model of its own, factors merged or not."""
    system, theirs = params_of(trained / "run")
    jax.tree.map(np.testing.assert_array_equal, started(trained, tmp_path), theirs)

    def frozen(components, config):
        for name in ("writer", "critic"):
            components[name]["mode"] = "frozen"

    jax.tree.map(np.testing.assert_array_equal, started(trained, tmp_path, frozen), theirs)
    load = load_system(str(tmp_path / "run.yaml"), "newest").params
    jax.tree.map(np.testing.assert_array_equal, load, theirs)

    def own(components, config):
        components["critic"] = {**components["writer"], "mode": "full"}

    wanted = merge_lora(system.node("remark").tree(theirs))
    jax.tree.map(np.testing.assert_array_equal, started(trained, tmp_path, own)["critic"], wanted)

    def apart(components, config):
        components["critic"] = components["writer"]

    kept = system.node("remark").tree(theirs)
    jax.tree.map(np.testing.assert_array_equal, started(trained, tmp_path, apart)["critic"], kept)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"critic": {"lora": {"rank": 3}}}, "the component 'critic' has LoRA factors of other settings there"),
        ({"writer": {"lora": {"rank": 3}}}, "the component 'writer' has LoRA factors of other settings there"),
        (
            {"critic": {"base": None, "checkpoint": "model"}, "editor": {"base": "critic"}},
            "the component 'editor' has the base 'writer' there and 'critic' here",
        ),
    ],
)
def test_what_would_change_shared_weights_is_no_start(trained, tmp_path, changed, said):
    def change(components, config):
        for name, fields in changed.items():
            components[name] |= fields
            if "checkpoint" in fields:
                components[name]["checkpoint"] = str(trained / "model")

    with pytest.raises(ConfigError) as error:
        started(trained, tmp_path, change)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"critic": {"base": "writr"}}, "system.components.critic.base 'writr' is not among the components: did you"),
        ({"critic": {"base": "critic"}}, "system.components.critic.base 'critic' is a role itself"),
        ({"critic": {"base": "editor"}}, "system.components.critic.base 'editor' is a role itself"),
        ({"critic": {"checkpoint": "x"}}, "system.components.critic: give either a checkpoint, a factory or a base"),
        ({"critic": {"mode": "full"}}, "critic has mode full, but its weights are those of 'writer': give it mode"),
        ({"writer": {"mode": "full"}}, "writer has mode full, but critic, editor share its weights: give it mode"),
        ({"critic": {"lora": {"targets": ["nothing"]}}}, "critic (a role of writer): LoRA target 'nothing' finds no"),
        ({"critic": {"settings": {"max_tokens": 3}}}, "system.components.critic.settings"),
        ({"critic": {"settings": {"max_new_tokens": 99}}}, "system.components.critic.settings: LanguageModel: max_pro"),
        (
            {"writer": {"checkpoint": None, "factory": "sysdpo_jax:Categorical", "mode": "frozen",
             "settings": {"num_values": 2, "parent_sizes": [2]}}},
            "system.components.critic (a role of writer): LoRA target 'attention' finds no dense layer",
        ),
        ({"spare": {"base": "writer"}}, "system.components.spare is the component of no node"),
        ({"spare": {"checkpoint": "x"}, "critic": {"base": "spare"}}, "spare is the base of roles and the component"),
    ],
)  # fmt: skip
def test_a_role_that_cannot_be_is_refused_with_the_field(material, tmp_path, changed, said):
    def change(components, config):
        for name, fields in changed.items():
            components[name] = components.get(name, {}) | fields
        for name in ("draft", "remark", "answer"):
            if "factory" in changed.get("writer", {}):
                config["system"]["nodes"][name].pop("prompt", None)

    with pytest.raises(ConfigError) as error:
        assemble(configured(material, tmp_path, change))
    assert said in str(error.value)
