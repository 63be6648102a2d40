"""The systems of docs/systems.md are built and run dry: as Python, and as the nodes of a configuration."""

import re
from pathlib import Path

import jax
import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.runs.system import _system
from sysdpo_jax.runs.system_config import SystemConfig
from tests.components.stubs import word_tokenizer
from tests.objectives.mixtures import DECODER

PAGE = (Path(__file__).parents[1] / "docs" / "systems.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
# What a generative node's value looks like, and an input's.
TEXT = "a red ball on the left"


def lm(prompt=None):
    """In the place of the page's own, which loads a checkpoint."""
    return sj.LanguageModel(Decoder(DECODER), word_tokenizer(), 8, 6, prompt=prompt, truncation="keep_end")


@pytest.fixture(autouse=True)
def conditions(monkeypatch):
    """Functions that a configuration names need not be there."""
    monkeypatch.setattr("sysdpo_jax.runs.system.import_function", lambda path, field: repr)


def parsed(nodes):
    return from_mapping(SystemConfig, nodes)


def code(section, language):
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def systems():
    """{title: system}; functions of earlier sections are known to later ones."""
    names, found = {"__name__": "page", "sj": sj, "lm": lm}, {}
    for section in SECTIONS:
        for snippet in code(section, "python"):
            exec(compile(snippet, "docs/systems.md", "exec"), names)
        found[section.splitlines()[0]] = names["system"]
    return found


def test_the_page_has_the_systems_that_people_ask_for(systems):
    assert list(systems) == [
        "Two parents in one prompt",
        "An agent loop",
        "A router",
        "Retrieval",
        "A black box",
    ]
    assert systems["An agent loop"].param_keys == ("agent",)


@pytest.mark.parametrize("title", [section.splitlines()[0] for section in SECTIONS])
def test_a_recorded_run_is_prepared_and_has_a_log_probability(systems, title):
    """Tools are called, prompts are made of their parents, and the step can be traced; nothing is compiled."""
    system = systems[title]
    record = dict.fromkeys(system.inputs, TEXT)
    for node in system.nodes:
        where = record.setdefault(node.loop, [{}])[0] if node.loop else record
        # Of a router's two ways one is taken.
        if not node.deterministic and node.name != "short":
            where[node.name] = 1 if isinstance(node.component, sj.Categorical) else "finish" if node.loop else TEXT
    features = system.prepare([record, record])
    params = jax.eval_shape(system.init, jax.random.key(0))
    logps = jax.eval_shape(system.log_prob, params, features, jax.random.key(1))
    assert {name: value.shape for name, value in logps.items()} == {node.name: (2,) for node in system.nodes}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_the_configuration_says_the_same(systems, section):
    system = systems[section.splitlines()[0]]
    [text] = code(section, "yaml")
    config = parsed({"inputs": list(system.inputs), "nodes": yaml.safe_load(text)})
    made = _system(config, lambda node, field, scope: sj.Tool(repr) if node.tool else sj.Categorical(2))
    assert [(n.name, n.parents, n.loop) for n in made.nodes] == [(n.name, n.parents, n.loop) for n in system.nodes]
    assert [n.name for n in made.nodes if n.deterministic] == [n.name for n in system.nodes if n.deterministic]
    for node in made.nodes:
        if isinstance(node.component, sj.Switch):
            assert node.component == system.node(node.name).component
    nodes = dict(config.nodes) | {name: own for node in config.nodes.values() for name, own in node.body.items()}
    for node in system.nodes:
        if isinstance(node.component, sj.LanguageModel):
            # Each parent by its own name: values in a wrong order, or one that is left out, give another prompt.
            made = node.component.prompt(*node.parents) if node.component.prompt else " ".join(node.parents)
            template = nodes[node.name].prompt or f"{{{node.parents[0]}}}"
            assert made == template.format(**{parent: parent for parent in node.parents})
