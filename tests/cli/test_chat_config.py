"""Chats in a configuration: the messages that a node makes, alone and in a loop, and what is refused."""

import json
from dataclasses import replace

import pytest

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import configure, read_config, write_config
from sysdpo_jax.runs.run import assemble
from sysdpo_jax.runs.system import Scope, _component
from sysdpo_jax.runs.system_config import NodeConfig
from tests.components.stubs import word_tokenizer
from tests.objectives.mixtures import DECODER

SCHEMAS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CHAT = """
system:
  inputs: [task]
  nodes:
    action: {component: agent, parents: [task], chat: true, system: Be brief., tools: TOOLS, prompt: "Solve {task}"}
  components:
    agent: {factory: "tests.cli.test_chat_config:agent", mode: full}
schedule: {steps: 7, warmup: 1}
"""


def agent():
    return sj.LanguageModel(Decoder(DECODER), word_tokenizer(chat=True), 8, 4)


@pytest.fixture
def file(tmp_path):
    def write(tools="tools.json"):
        (tmp_path / "tools.json").write_text(json.dumps(SCHEMAS))
        path = tmp_path / "run.yaml"
        path.write_text(CHAT.replace("TOOLS", tools))
        return path

    return write


@pytest.mark.parametrize("tools", ["tools.json", json.dumps(SCHEMAS), '"tests.cli.test_chat_config:SCHEMAS"'])
def test_schemas_come_from_a_file_beside_the_configuration_a_module_or_stand_there(file, tools, tmp_path):
    config = read_config(file(tools))
    write_config(tmp_path / "again.yaml", config)
    assert read_config(tmp_path / "again.yaml").system == config.system
    model = assemble(config).system.node("action").component
    assert model.prompt == sj.ChatPrompt("Solve {task}", ("task",), system="Be brief.", tools=SCHEMAS)
    made = model.prompt("2")
    assert made["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(made["tools"]) == SCHEMAS


@pytest.mark.parametrize(
    ("tools", "message"),
    {
        "no file": ("no.json", "system.nodes.action.tools: .*no.json cannot be read"),
        "no schemas": (
            '"tests.cli.test_chat_config:CHAT"',
            "nodes.action: ChatPrompt: tools is a text that is not",
        ),
        "nothing": ('"add"', "system.nodes.action.tools is 'add': write module:name"),
    }.values(),
)
def test_schemas_that_cannot_be_had_are_refused(file, tools, message):
    with pytest.raises(ConfigError, match=message):
        assemble(read_config(file(tools)))


def test_the_fields_are_flags(file):
    config = configure(TrainConfig, [str(file()), "--system.nodes.action.observations", "user"])
    assert config.system.nodes["action"].observations == "user"
    with pytest.raises(ConfigError, match=r"action\.observations is 'system': give 'tool' or 'user'"):
        configure(TrainConfig, [str(file()), "--system.nodes.action.observations", "system"])


ACTION = NodeConfig(("task", "agent"), "agent", chat=True)
BODY = {"action": ACTION, "seen": NodeConfig(("action",), tool="json:loads"), "plan": NodeConfig(("task",), "agent")}


def built(**settings):
    node = replace(ACTION, **settings)
    scope = Scope("agent", "action", BODY | {"action": node})
    return _component("system.nodes.agent.body.action", node, {"agent": (agent(), {})}, scope).prompt


def test_a_node_of_a_loop_makes_its_messages():
    """Its own values are the assistant's; of the others those of tools are what it observes."""
    assert built() == sj.ChatPrompt("{task}", ("task", "agent"), "agent", "action", ("seen",))
    assert built(observations="user").role == "user"
    turns = [{"plan": "b", "action": "a", "seen": 4}]
    assert built(observations="user")("2", turns) == [
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "4"},
    ]
    # One that does not read the loop has no turns, and a text holds them as lines.
    assert built(parents=("task",)) == sj.ChatPrompt("{task}", ("task",))
    assert built(chat=False, prompt="{task}\n{agent}")("2", turns) == "2\nb\na\n4\n"
    assert isinstance(built(chat=False, prompt="{agent}"), TextPrompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"chat": False, "prompt": "{task}", "system": "a"},
            r"body\.action\.system is of a chat: add chat: true",
        ),
        ({"parents": ("task", "seen", "agent")}, "has 2 parents: give a prompt that joins them"),
        ({"prompt": "{agent}"}, r"must name parents in braces \(task\): it names 'agent'"),
        ({"component": None, "tool": "json:loads"}, "is a tool, which has no chat: leave that out"),
        ({"retries": 2}, "is no tool, which alone has retries"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_with_its_node(settings, message):
    with pytest.raises(ConfigError, match=message):
        built(**settings)
