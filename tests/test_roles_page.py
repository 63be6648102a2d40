"""The system of docs/roles.md is built and traced, from YAML and in Python; its tables are those of the file."""

import json
import re
from pathlib import Path

import jax
import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.system import build_optimizer, build_system
from tests.pretrained.checkpoints import write_decoder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "roles.md").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_decoder(folder, "llama", num_hidden_layers=1, max_position_embeddings=2048)
    return folder


def code(language):
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_configuration_is_a_system_of_three_roles(model, tmp_path):
    written = yaml.safe_load(code("yaml").replace("path/to/model", str(model)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    config = read_config(tmp_path / "run.yaml")
    system, params = build_system(config, sj.make_mesh())
    bases = {node.name: node.base for node in system.nodes}
    assert bases == {"draft": None, "remark": "writer", "answer": "writer"}
    assert system.node("remark").component.max_prompt_length == 1024
    mask = build_optimizer(config).mask(system, params)
    assert all(any(jax.tree.leaves(mask[role])) for role in ("writer", "critic", "editor"))
    texts = {"question": "a red ball", "draft": "the cube", "remark": "on the left", "answer": "red"}
    features = system.prepare([texts, texts])
    shapes = jax.eval_shape(system.log_prob, params, features, jax.random.key(0))
    assert {name: shape.shape for name, shape in shapes.items()} == dict.fromkeys(bases, (2,))


def test_the_python_says_the_same(model):
    names = {"__name__": "page"}
    exec(compile(code("python").replace("path/to/model", str(model)), "docs/roles.md", "exec"), names)
    assert set(names["state"].trained) == {"draft", "remark"}
    whole, weights = names["whole"], names["state"].params["draft"]
    assert whole["embed_tokens"]["embedding"] is weights["embed_tokens"]["embedding"]


def test_the_tables_are_those_of_the_file():
    """And three roles need at most 1.15 times the memory of one."""
    found = json.loads((ROOT / "docs/benchmarks/roles.json").read_text())
    rows = re.findall(r"^\| (.*) \|$", PAGE, re.MULTILINE)
    for case in found["memory"]:
        sizes = [case[name][part] for name in ("one", "three") for part in ("arguments", "temporaries", "peak")]
        assert " | ".join([case["remat"], *(f"{size:.2f}" for size in sizes), f"{case['ratio']:.2f}"]) in rows
    [whole] = [case["ratio"] for case in found["memory"] if case["remat"] == "whole"]
    assert whole <= 1.15
    together, apart = (found["passes"][name] for name in ("together", "apart"))
    for name, case in (("together", together), ("apart", apart)):
        gathers = case["collectives_per_chip"]["all-gather"]["bytes"]
        flops, read = case["compiler_flops_per_chip"], case["compiler_bytes_per_chip"]
        peak = case["memory_per_chip_gib"]["peak"]
        assert f"{name} | {flops / 1e9:.0f} | {read / 1e9:.2f} | {gathers / 1e9:.1f} | {peak:.2f}" in rows
