"""The chat of docs/agents.md as Python and as the nodes of a configuration: one row holds a run's turns."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.runs.system import _component, _system
from sysdpo_jax.runs.system_config import SystemConfig
from tests.components.drawn import drawn
from tests.components.test_sampled_turns import sampled, tokenizer_in

PAGE = (Path(__file__).parents[1] / "docs" / "agents.md").read_text()
# Without templates of tools the model's tests have no room for these.
TEMPLATE = (
    "{% if tools %}{{ tools | length }}{% endif %}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
PARTS = {"model": {"checkpoint": "path/to/model"}}
CALL = '<tool_call>{"name":"add","arguments":{"a":2,"b":2}}'


def model(prompt=None):
    tokenizer, end, _ = tokenizer_in("SmolLM2")
    tokenizer.chat_template = TEMPLATE
    config = DecoderConfig(len(tokenizer), 16, 24, 1, 2, 1, max_position_embeddings=400)
    return sj.LanguageModel(Decoder(config), tokenizer, 300, 80, prompt, stop_tokens=(end,))


@pytest.fixture
def systems(monkeypatch, tmp_path):
    """The system of the page's Python, and that of its YAML."""
    monkeypatch.setattr(sj.pretrained, "load", lambda path, prompt, **lengths: (model(prompt), {}))
    page = ModuleType("my_package.agent")
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "docs/agents.md", "exec"), vars(page))
    monkeypatch.setitem(sys.modules, "my_package", ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.agent", page)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(page.tools))
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = from_mapping(SystemConfig, {"inputs": ["task"], "nodes": yaml.safe_load(text), "components": PARTS})
    parts = {"model": (model(), {})}
    return page.system, _system(config, lambda node, field, scope: _component(field, node, parts, scope))


def test_both_ask_the_same_but_for_the_systems_message(systems):
    asks = [system.node("action").component.prompt for system in systems]
    turns = [{"action": CALL, "seen": systems[0].node("seen").component.function(CALL)}]
    told, configured = (ask("2+2?", turns) for ask in asks)
    assert [(m["role"], m["content"]) for m in told["messages"]] == [
        ("user", "2+2?"), ("assistant", CALL), ("tool", "4"),
    ]  # fmt: skip
    assert configured["messages"] == [{"role": "system", "content": "Use the tools."}, *told["messages"]]
    assert configured["tools"] == told["tools"]


def test_a_run_is_one_row_with_the_sum_of_its_turns(systems):
    """1e-5 relative to the turns alone, prepared without the loop: float32 sums over some 60 tokens."""
    for system in systems:
        node, tools = system.node("action"), system.node("seen").component.function
        tokenizer = node.component.tokenizer
        letters = ["<tool_call>", *CALL.removeprefix("<tool_call>")]
        turns = [{"action": sampled(tokenizer, word, 3)} for word in (letters, letters, "ab")]
        turns = [turn | {"seen": tools(turn["action"])} for turn in turns]
        assert [turn["seen"] for turn in turns] == ["4", "4", ""]
        features = system.prepare([{"task": "2+2?", "agent": turns}])
        assert features["action"].ran.sum() == 1
        params = {node.params_key: drawn(node.component.init)}
        [together] = system.log_prob(params, features, jax.random.key(0))["action"]
        parents = {"task": ["2+2?"] * 3, "agent": [turns[:number] for number in range(3)]}
        alone = node.component.prepare([turn["action"] for turn in turns], parents)
        expected = jax.jit(node.component.log_prob)(params[node.params_key], alone, jax.random.key(0))
        np.testing.assert_allclose(together, expected.sum(), rtol=1e-5)


def test_a_prompt_that_comes_before_the_turn_is_no_observation():
    nodes = """
    agent:
      turns: 2
      body:
        clock: {tool: "json:loads", parents: [task]}
        note: {tool: "json:loads", parents: [clock]}
        action: {component: model, parents: [task, note, agent], chat: true, prompt: "{note}: {task}"}
        one: {tool: "json:loads", parents: [action]}
        two: {tool: "json:loads", parents: [action]}
        seen: {switch: action, branches: {a: one, b: two}}
        score: {tool: "json:loads", parents: [action]}
    """
    config = from_mapping(SystemConfig, {"inputs": ["task"], "nodes": yaml.safe_load(nodes), "components": PARTS})
    parts = {"model": (model(), {})}
    system = _system(config, lambda node, field, scope: _component(field, node, parts, scope))
    assert system.node("action").component.prompt.observations == ("seen", "score")
