"""Answers that are calls of tools."""

import json
from dataclasses import replace

import pytest
import transformers

from sysdpo_jax.cli import import_traces
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.traces.messages import NoText, answer_of, messages_of, output_text
from sysdpo_jax.traces.spans import Span
from sysdpo_jax.traces.tokens import with_tokens
from sysdpo_jax.values import from_json
from tests.components.stubs import byte_tokenizer
from tests.traces.spans import llm, root, row, write
from tests.traces.test_import_command import imported, lines, system

CALL = {"id": "c1", "type": "function", "function": {"name": "on", "arguments": {"of": "red"}}}
WANTED = [{"role": "assistant", "tool_calls": [CALL]}]
# Calls as a model of the word tokenizer would write them, and what says one of JSON.
TEMPLATE = (
    "{% for m in messages %}the {{ m.role }} on {% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }} {{ c.function.arguments.of }} {% endfor %}{% else %}{{ m.content }} {% endif %}"
    "<eos> large {% endfor %}{% if add_generation_prompt %}the assistant on {% endif %}"
)


@pytest.mark.parametrize(
    "value",
    [
        {"choices": [{"message": {"content": None, "tool_calls": [{**CALL, "function": {**CALL["function"]}}]}}]},
        {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "on", "arguments": '{"of": "red"}'}}]},
        {"generations": [[{"text": "", "message": {"kwargs": {"content": "", "tool_calls": [
            {"name": "on", "args": {"of": "red"}, "id": "c1", "type": "tool_call"}]}}}]]},
        {"role": "assistant", "parts": [
            {"type": "tool_call", "id": "c1", "name": "on", "arguments": {"of": "red"}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "on", "input": {"of": "red"}}]},
        {"kwargs": {"content": "", "additional_kwargs": {"tool_calls": [CALL]}}},
    ],
)  # fmt: skip
def test_calls_in_the_forms_of_programs(value):
    assert answer_of(value) == WANTED


@pytest.mark.parametrize(
    "output",
    [
        {"type": "tool", "data": {"content": "4", "type": "tool", "tool_call_id": "c1"}},
        {"lc": 1, "type": "constructor", "id": ["ToolMessage"], "kwargs": {"content": "4", "type": "tool"}},
        {"content": "4", "type": "tool", "name": "on", "tool_call_id": "c1", "status": "success"},
        {"role": "tool", "content": [{"type": "text", "text": "4"}]},
        "4",
        4,
    ],
)
def test_the_message_of_a_tool_is_its_content(output):
    assert output_text(Span("t", "s", None, "TOOL", "on", output=output)) == "4"


def test_what_a_tool_says_of_another_type_is_kept_whole():
    output = {"type": "tool", "content": [{"type": "image_url", "url": "x"}]}
    assert json.loads(output_text(Span("t", "s", None, "TOOL", "on", output=output))) == output


def test_calls_beside_a_text_without_ids_and_without_names():
    assert answer_of({"text": "so", "tool_calls": [CALL]})[0]["content"] == "so"
    assert answer_of({"tool_calls": [{"name": "f"}]})[0]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    with pytest.raises(NoText, match="a call of a tool without a name"):
        answer_of({"tool_calls": [{"arguments": {}}]})
    told = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    assert messages_of([*WANTED, told]) == [{**WANTED[0], "content": ""}, told]


def agent(trace, of, answer, score, **attributes):
    """It calls a tool, and answers with what it got."""
    asked = [{"role": "user", "content": f"a {of}"}]
    made = llm(trace, "c", "root", "decide", 1, asked, None, **attributes)
    call = "llm.output_messages.0.message.tool_calls.0.tool_call"
    arguments = json.dumps({"of": of})
    made["attributes"] |= {f"{call}.id": "c1", f"{call}.function.name": "on", f"{call}.function.arguments": arguments}
    tool = row(trace, "t", "root", "TOOL", "on", 2, input__value=arguments, output__value=f"left {of}")
    return [root(trace, of, score), made, tool, llm(trace, "a", "root", "say", 3, f"the left {of}", answer)]


@pytest.fixture
def tools(small, tmp_path):
    """A small model whose chat template writes calls."""
    folder = tmp_path / "tools"
    transformers.AutoModelForCausalLM.from_pretrained(small).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_an_agent_that_calls_a_tool_leads_to_a_dry_run(place, tools, small, capsys):
    """Recorded or trained; with the ids of the trace a call is the text that the model wrote, if it says that call."""
    ids = {"choices": [{"message": {"tool_calls": [CALL]}, "token_ids": [11, 5, 2], "finish_reason": "tool_calls"}]}
    rows = agent("1", "red", "ball", 1.0) + agent("2", "red", "cube", 0.0, **{"llm.token_count.completion": 3})
    rows += agent("3", "red", "cube", 0.5, **{"output.value": json.dumps(ids)})
    traces = write(place / "t.jsonl", rows)
    made = system(imported(traces, "openinference", "--model", f"say={small}", folder="recorded"))
    assert made["nodes"]["say"] == {"component": "say", "parents": ["on"], "chat": True, "prompt": "the {on}"}
    folder = imported(traces, "openinference", "--model", f"small={tools}")
    said = capsys.readouterr().out
    assert "9 spans of models, retrievers and tools: 9 mapped, 0 refused by name" in said
    [counted] = [line for line in said.splitlines() if line.startswith("tokens of decide")]
    assert "1 answers whose ids say another text, tokenized anew; 1 answers without ids, of as many tokens" in counted
    values = {run["id"]: from_json(run["outputs"]["decide"]) for run in lines(folder / "runs.jsonl")}
    assert values["1"] == values["3"] == WANTED
    dispatch(["train", str(folder / "system.yaml"), "--dry-run", "--schedule.batch_size", "1"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out
    config = import_traces.Config(traces, "openinference", place / "other", model=(f"small={small}",))
    with pytest.raises(ConfigError, match=r"that decide answered do not fit its model: .*'tool_calls'"):
        import_traces.run(config)


def test_ids_of_a_call_are_the_text_that_a_model_wrote():
    """Of the same call; of another one the message stays, which this tokenizer has no template for."""
    tokenizer, text = byte_tokenizer(), f"<tool_call>{json.dumps(CALL['function'])}</tool_call>"
    ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    span = Span("t", "s", None, "LLM", "decide", prompt="a", answer=WANTED, tokens=ids)
    made = with_tokens(tokenizer, "decide", [span])
    assert (made.values, made.ids, made.others) == ((text,), 1, 0)
    assert (made.values[0].tokens, made.values[0].end) == (ids, "end")
    other = [{"role": "assistant", "tool_calls": [{"function": {"name": "off", "arguments": {}}}]}]
    with pytest.raises(ConfigError, match="calls of tools that decide answered do not fit its model"):
        with_tokens(tokenizer, "decide", [span, replace(span, answer=other)])
