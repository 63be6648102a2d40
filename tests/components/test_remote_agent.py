"""An agent behind a server that calls tools as OpenAI's API has them: every call is answered with its own id."""

import jax
import pytest

import sysdpo_jax as sj
from tests.components.test_remote import Answers, serving


def add(a, b):
    return a + b


def finished(turn):
    return turn["seen"] == ""


def reads_ids(text):
    """A tool of a program's own, which knows nothing of calls."""
    return "" if isinstance(text, str) else "seen"


def calls(*arguments):
    return [
        {"id": f"call-{place}", "type": "function", "function": {"name": "add", "arguments": each}}
        for place, each in enumerate(arguments)
    ]


# What each task's model calls first.
FIRST = {
    "one": calls('{"a": 2, "b": 3}'),
    "two": calls('{"a": 2, "b": 3}', '{"a": 4, "b": 5}'),
    "wrong": calls("", '{"a": 4', '{"a": 4, "b": 5}'),
    "none": [],
}


def fault_of(messages):
    """What OpenAI's API refuses: a call without its answer, and an answer without its call."""
    waiting = []
    for message in messages:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                return f"'tool_call_id' {message.get('tool_call_id')!r} answers no call"
            waiting.remove(message["tool_call_id"])
        elif waiting:
            return f"no answer to {waiting}"
        else:
            waiting = [call["id"] for call in message.get("tool_calls") or ()]
    return f"no answer to {waiting}" if waiting else None


class Agent(Answers):
    """Calls tools first, and then says what they answered."""

    def answer(self, body):
        asked, fault = body["messages"], fault_of(body["messages"])
        if fault:
            return {"error": {"message": fault, "code": 400}}
        told = [message["content"] for message in asked if message["role"] == "tool"]
        if not told and FIRST[asked[0]["content"]]:
            return {"choices": [{"message": {"content": None, "tool_calls": FIRST[asked[0]["content"]]}}]}
        return {"choices": [{"message": {"content": " and ".join(told) or "nothing"}}]}


@pytest.fixture
def server():
    with serving(Agent()) as url:
        yield url


def agent(url, tmp_path, tool, observations=("seen",)):
    ask = sj.ChatPrompt("{task}", ("task", "agent"), "agent", "action", observations)
    model = sj.RemoteModel(url, "m", prompt=ask, cache=str(tmp_path / "answers.sqlite"), retries=0)
    body = (sj.Node("action", model, ("task", "agent")), sj.Node("seen", sj.Tool(tool), ("action",)))
    return sj.CompoundSystem(("task",), (sj.Loop("agent", body, 3, finished),))


def test_a_remote_agent_calls_tools(server, tmp_path):
    system = agent(server, tmp_path, sj.Functions((add,)))
    inputs = [{"task": task} for task in FIRST]
    rows = dict(zip(FIRST, system.sample(system.init(jax.random.key(0)), inputs, jax.random.key(1)), strict=True))
    assert [[turn["seen"] for turn in row["agent"]] for row in rows.values()] == [
        ["5", ""],
        [["5", "9"], ""],
        [
            [
                "error: add cannot be called so: missing a required argument: 'a'",
                rows["wrong"]["agent"][0]["seen"][1],
                "9",
            ],
            "",
        ],
        [""],
    ]
    assert rows["wrong"]["agent"][0]["seen"][1].startswith("error: a tool call is not JSON")
    assert rows["two"]["agent"][0]["action"] == [{"role": "assistant", "tool_calls": FIRST["two"]}]
    assert [rows[task]["agent"][-1]["action"] for task in ("one", "two", "none")] == ["5", "5 and 9", "nothing"]


def test_tools_of_a_program_answer_one_call_and_are_told_of_more(server, tmp_path):
    system = agent(server, tmp_path, reads_ids)
    params, key = system.init(jax.random.key(0)), jax.random.key(1)
    [row] = system.sample(params, [{"task": "one"}], key)
    assert row["agent"][-1]["action"] == "seen"
    with pytest.raises(sj.RecordError, match="a turn of 'agent' has 2 calls of tools and 1 answers: name an observ"):
        system.sample(params, [{"task": "two"}], key)
    with pytest.raises(sj.RecordError, match="has 1 calls of tools and 0 answers"):
        agent(server, tmp_path, reads_ids, ()).sample(params, [{"task": "one"}], key)


def test_calls_in_messages_are_read_as_those_in_texts():
    message = {"role": "assistant", "tool_calls": FIRST["two"]}
    assert sj.tool_calls([message]) == [("add", {"a": 2, "b": 3}), ("add", {"a": 4, "b": 5})]
    flat = {"role": "assistant", "content": "so", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}
    assert sj.tool_calls([flat]) == [("add", {"a": 1, "b": 2})]
    text = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    assert sj.tool_calls([{"role": "assistant", "content": text}]) == sj.tool_calls(text)
    assert sj.Functions((add,))([{"role": "assistant", "content": text}]) == "3"
    assert sj.Functions((add,))([{"role": "assistant", "content": "no call"}]) == ""
    with pytest.raises(sj.RecordError, match="tool call 0 must be an object with a 'name'"):
        sj.tool_calls([{"role": "assistant", "tool_calls": ["add"]}])
