"""Messages from parents' values and turns of a loop, and calls of tools in what a model wrote."""

import json

import jax
import pytest

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.user_code import name_of
from sysdpo_jax.values import SampledText

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SAID = SampledText("<tool_call>{}</tool_call>", [1, 2], "end", "0")
TURNS = [{"action": SAID, "seen": "4", "score": {"a": [1]}, "quiet": None}, {"action": "done", "seen": 3}]
USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}


def chat(**settings):
    return sj.ChatPrompt("{task}", ("task", "agent"), "agent", "action", **({"observations": ("seen",)} | settings))


def test_messages_of_a_loop():
    """What was sampled is passed on as it is, so that it keeps its tokens."""
    messages = chat()("2+2?", TURNS)
    assert messages == [
        USER,
        {"role": "assistant", "content": SAID},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "done"},
        {"role": "tool", "content": "3"},
    ]
    assert messages[1]["content"] is SAID
    assert chat()("2+2?", []) == [USER]
    assert [m["role"] for m in chat(role="user")("2+2?", TURNS)] == ["user", "assistant", "user", "assistant", "user"]


def test_observations_that_are_no_text_or_nothing():
    told = chat(observations=("seen", "score", "quiet"))("2+2?", TURNS[:1])[2:]
    assert [m["content"] for m in told] == ["4", '{"a": [1]}']
    with pytest.raises(sj.RecordError, match="'seen' is set, which no message can hold"):
        chat()("2+2?", [{"action": "a", "seen": {1}}])
    with pytest.raises(sj.RecordError, match=r"a turn of 'agent' lacks 'seen' \(it has action\): name what"):
        chat()("2+2?", [{"action": "a"}])
    with pytest.raises(sj.RecordError, match="the value of the loop 'agent' must be a list of turns, not str"):
        chat()("2+2?", "a")


def test_system_and_tools():
    made = chat(system="Be brief.", tools=[ADD])("2+2?", TURNS)
    assert made["messages"][:2] == [SYSTEM, USER]
    assert json.loads(made["tools"]) == [ADD]
    assert chat(tools=json.dumps([ADD])) == chat(tools=(ADD,))
    assert hash(chat(tools=[ADD])) != hash(chat())
    with pytest.raises(ValueError, match="tools must be a list of objects"):
        chat(tools='["add"]')


def test_messages_and_conversations_as_the_task():
    asked = [SYSTEM, USER]
    assert chat()(asked, TURNS)[:3] == [*asked, {"role": "assistant", "content": SAID}]
    whole = chat()({"messages": asked, "chat_template_kwargs": {"terse": True}}, TURNS)
    assert (len(whole["messages"]), whole["chat_template_kwargs"]) == (6, {"terse": True})
    with pytest.raises(sj.RecordError, match="have a system's message already"):
        chat(system="Be brief.")(asked, [])
    with pytest.raises(sj.RecordError, match="has tools already"):
        chat(tools=[ADD])({"messages": [USER], "tools": [ADD]}, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parents": ("task",)}, "the loop 'agent' is no parent"),
        ({"assistant": None}, "give turns and assistant, or none"),
        ({"turns": None, "assistant": None, "prompt": "{task}{agent}"}, "give turns and assistant, or none"),
        ({"prompt": "{agent}"}, r"must name parents in braces \(task\): it names 'agent'"),
        ({"prompt": "{task"}, "is no template"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(settings, message):
    given = {"prompt": "{task}", "parents": ("task", "agent"), "turns": "agent", "assistant": "action"}
    with pytest.raises(ValueError, match=message):
        sj.ChatPrompt(**(given | {"observations": ("seen",)} | settings))


def test_turns_as_a_text():
    prompt = TextPrompt("{task}\n{agent}", ("task", "agent"))
    assert prompt("2+2?", []) == "2+2?\n"
    assert prompt("2+2?", [{"action": "add", "seen": 4}, {"action": "done"}]) == "2+2?\nadd\n4\ndone\n"


CALLS = {
    "Hermes": 'So\n<tool_call>\n{"name": "f", "arguments": {"x": [1, "</a>"]}}\n</tool_call>',
    "stopped at its end": '<tool_call>{"name": "f", "arguments": {"x": [1, "</a>"]}}',
    "Llama 3": '{"name": "f", "parameters": {"x": [1, "</a>"]}}',
    "Llama 3, marked": '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": [1, "</a>"]}}',
    "Mistral": 'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1, "</a>"]}, "id": "123456789"}]',
    "Mistral, newer": '[TOOL_CALLS]f[ARGS]{"x": [1, "</a>"]}',
    "arguments as a text": '<tool_call>{"name": "f", "arguments": "{\\"x\\": [1, \\"</a>\\"]}"}</tool_call>',
}


@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS)
def test_a_call_is_read(text):
    assert sj.tool_calls(text) == [sj.ToolCall("f", {"x": [1, "</a>"]})]


def test_several_calls_and_none():
    two = '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>'
    assert sj.tool_calls(two) == [("f", {}), ("g", {"x": 1})]
    assert sj.tool_calls('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1}}') == sj.tool_calls(two)
    assert sj.tool_calls('[TOOL_CALLS]f{}[TOOL_CALLS]g{"x": 1}') == sj.tool_calls(two)
    for text in ("", "The sum is 4.", '{"answer": 4}', "{x} is a set", "[1, 2]"):
        assert sj.tool_calls(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "cut": ('<tool_call>{"name": "f", "argum', "a tool call is not JSON"),
        "nothing": ("<tool_call></tool_call>", "a tool call is not JSON"),
        "no name": ('<tool_call>{"arguments": {}}</tool_call>', "tool call 0 must be an object with a 'name', not"),
        "a list": ('<tool_call>{"name": "f"}</tool_call><tool_call>[1]</tool_call>', "tool call 1 must be an object"),
        "arguments": ('{"name": "f", "parameters": [1]}', "tool call 0, of 'f': the arguments must be an object"),
        "more": ('{"name": "f", "parameters": {}} and more', "a tool call is not JSON"),
    }.values(),
)
def test_a_call_that_cannot_be_read_says_why(text, message):
    with pytest.raises(sj.RecordError, match=message):
        sj.tool_calls(text)


def add(a, b=2):
    if a == 0:
        raise sj.RecordError("a is 0")
    return a / b if b == 0 else a + b


def look(up):
    return {"found": up}


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_functions_answer_calls_and_tell_the_model_what_it_did_wrong():
    table = sj.Functions((add, look))
    assert table(call("add", a=1) + call("look", up="é")) == '3\n{"found": "é"}'
    assert table("no call") == ""
    assert table(call("ad", a=1)) == "error: there is no tool 'ad': did you mean 'add'?"
    assert table(call("add", c=1)) == "error: add cannot be called so: missing a required argument: 'a'"
    assert table(call("add", a=0)) == "error: a is 0"
    assert table("<tool_call>{").startswith("error: a tool call is not JSON")
    # What the function itself raises is a failure of the tool, which may be tried again.
    with pytest.raises(sj.RecordError, match=r"Functions\(.*add, .*look\).*ZeroDivisionError"):
        sj.Tool(table).sample({}, {"action": [call("add", a=1, b=0)]}, jax.random.key(0))
    assert name_of(table) != name_of(sj.Functions((add,)))
    with pytest.raises(ValueError, match="names of their own"):
        sj.Functions((add, add))


def test_each_call_in_a_message_is_answered_by_its_id():
    """As many observations as calls are one for each; without ids, as of a model's own chats, messages have none."""

    def turns(*ids, **seen):
        made = [{"type": "function", "function": {"name": "f", "arguments": "{}"}} | each for each in ids]
        return [{"action": [{"role": "assistant", "tool_calls": made}], **seen}]

    one, two = {"id": "1"}, {"id": "2"}
    assert chat()("2+2?", turns(one, seen=[4]))[2:] == [{"role": "tool", "tool_call_id": "1", "content": "[4]"}]
    answers = [
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "2", "content": "5"},
    ]
    assert chat()("2+2?", turns(one, two, seen=[4, "5"]))[2:] == answers
    assert chat(observations=("seen", "more"))("2+2?", turns(one, two, seen=4, more="5"))[2:] == answers
    assert chat()("2+2?", turns({}, seen="4"))[2:] == [{"role": "tool", "content": "4"}]
    assert chat(role="user")("2+2?", turns(one, seen="4"))[2:] == [{"role": "user", "content": "4"}]
    with pytest.raises(sj.RecordError, match="has 2 calls of tools and 3 answers"):
        chat()("2+2?", turns(one, two, seen=[1, 2, 3]))
