"""The chat of docs/agents.md: its messages and tools in Python, and the same of its nodes in a configuration."""

import json
import re
from pathlib import Path

import yaml

import sysdpo_jax as sj
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.runs.config import NodeConfig
from sysdpo_jax.runs.system import _prompt
from tests.components.stubs import word_tokenizer
from tests.objectives.mixtures import DECODER

PAGE = (Path(__file__).parents[1] / "docs" / "agents.md").read_text()
SAID = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call>'


def test_the_page_asks_calls_and_tells(monkeypatch, tmp_path):
    """Python and YAML make the same messages, but for the system's, which the configuration adds."""
    made = []

    def load(path, prompt, **lengths):
        made.append((prompt, lengths))
        return sj.LanguageModel(Decoder(DECODER), word_tokenizer(chat=True), 8, 4, prompt=prompt), {}

    monkeypatch.setattr(sj.pretrained, "load", load)
    names = {"__name__": "page"}
    exec(compile(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], "docs/agents.md", "exec"), names)
    turns = [{"action": SAID, "seen": names["answer"](SAID)}]
    asked = made[0][0]("2+2?", turns)
    assert [message["role"] for message in asked["messages"]] == ["user", "assistant", "tool"]
    assert asked["messages"][-1]["content"] == "4"
    assert names["answer"]("It is 4.") == ""

    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(names["tools"]))
    nodes = {name: from_mapping(NodeConfig, node) for name, node in yaml.safe_load(text).items()}
    configured = _prompt("action", nodes["action"], "action", ("agent", nodes))("2+2?", turns)
    assert configured["messages"] == [{"role": "system", "content": "Use the tools."}, *asked["messages"]]
    assert configured["tools"] == asked["tools"]
