"""What a chat template is given of a conversation, against transformers' own call of the template."""

import json

import pytest

from sysdpo_jax import LanguageModel, RecordError
from sysdpo_jax.components.conversations import read_arguments, read_conversation, read_messages, read_tools
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import byte_tokenizer

# Tools, an argument, calls, names and reasoning are read; a turn ends with <eos>.
TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]{% endif %}"
    "{% if terse is defined and terse %}(terse){% endif %}"
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}<call>{{ call.function | tojson }}{% endfor %}{% endif %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content }}<eos>{% endfor %}"
USER = {"role": "user", "content": "price?"}
TOOL = {"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "price", "arguments": {"of": "pear"}}}


def model(template=TEMPLATE, **settings):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 4) | dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1
    )
    config = DecoderConfig(vocab_size=len(tokenizer), max_position_embeddings=600, **sizes)
    return LanguageModel(Decoder(config), tokenizer, 400, 100, **settings)


def texts(component, prompt, value):
    """What is trained on: prompt and completion."""
    features = component.prepare([value], {"x": [prompt]})
    start, end = features["prompt_lengths"][0], features["lengths"][0]
    row = features["tokens"][0]
    return component.tokenizer.decode(row[:start]), component.tokenizer.decode(row[start:end])


def templated(component, messages, **arguments):
    return component.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


@pytest.mark.parametrize(
    ("extras", "arguments"),
    [
        ({}, {}),
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
        ({"tools": []}, {}),
        ({"chat_template_kwargs": {"terse": True}}, {"terse": True}),
        ({"tools": [TOOL], "chat_template_kwargs": '{"terse": true}'}, {"tools": [TOOL], "terse": True}),
    ],
)
def test_tools_and_arguments_reach_the_template_in_training_and_sampling(extras, arguments):
    component, value = model(), {"messages": [USER], **extras}
    wanted = templated(component, [USER], add_generation_prompt=True, **arguments)
    for completion in ("Two.", [{"role": "assistant", "content": "Two."}]):
        assert texts(component, value, completion) == (wanted, "Two.<eos>")
    tokens, lengths = component.prompt_tokens({"x": [value]})
    assert component.tokenizer.decode(tokens[0][: lengths[0]]) == wanted


def with_tools(question):
    return {"messages": [{"role": "user", "content": question}], "tools": [TOOL]}


def test_a_prompt_function_may_return_tools_too():
    prompt, _ = texts(model(prompt=with_tools), "price?", "Two.")
    assert prompt == templated(model(), [USER], tools=[TOOL], add_generation_prompt=True)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, PLAIN.replace("m.content }}", "m.content | trim }}")])
def test_text_parts_are_one_text(template):
    """Parts are written one behind the other, as templates of models with pictures write them."""
    parts = [{"type": "text", "text": "pri"}, {"type": "text", "text": "ce?", "image_url": None}]
    component = model(template)
    one = texts(component, [USER], [{"role": "assistant", "content": "Two."}])
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Two."}]}]
    assert texts(component, [{"role": "user", "content": parts}], answer) == one
    assert one[1].endswith("Two.<eos>")


def test_keys_of_messages_are_passed_on():
    turn = {"role": "user", "content": "price?", "name": "Ann"}
    prompt, _ = texts(model(), [turn], "Two.")
    assert prompt == "user Ann: price?<eos>assistant: "


def test_a_call_without_content():
    """Nothing writes "None"; a key that lacks says the same."""
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "name": "price", "content": "2"}
    component = model()
    wanted = 'assistant: <call>{"name": "price", "arguments": {"of": "pear"}}<eos>'
    assert texts(component, [USER, call, told], "Two.")[0] == f"user: price?<eos>{wanted}tool price: 2<eos>assistant: "
    # A template that writes no ids of calls tells them apart by their order.
    told["tool_call_id"] = "1"
    assert texts(component, [USER, call, told], "Two.")[0] == f"user: price?<eos>{wanted}tool price: 2<eos>assistant: "
    assert texts(component, [USER], [call])[1] == wanted.removeprefix("assistant: ")
    absent = {name: value for name, value in call.items() if name != "content"}
    assert texts(component, [USER], [absent])[1] == wanted.removeprefix("assistant: ")


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "a role": ([{"role": None, "content": "a"}], "message 0: the role is None: give a text such as 'user'"),
        "no content": ([USER, {"role": "assistant"}], "message 1 has no content: give a text, or 'tool_calls'"),
        "a number": ([{"role": "user", "content": 3}], "message 0: the content is int: give a text, or a list of"),
        "an object": ([{"role": "user", "content": {"a": 1}}], "message 0: the content is dict"),
        "no part": ([{"role": "user", "content": []}], "the content is a list of nothing"),
        "a bare part": ([{"role": "user", "content": ["a"]}], "message 0, part 0 is str: give"),
        "a picture": (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "message 0, part 0 is of the type 'image_url', and a language model reads the type 'text' alone",
        ),
        "no type": ([{"role": "user", "content": [{"text": "a"}]}], "part 0 is of the type None"),
        "a part's field": (
            [{"role": "user", "content": [{"type": "text", "text": "a", "weight": 2}]}],
            "part 0 has the field 'weight', which nothing reads",
        ),
        "a part's text": ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "'text' must be a text, not"),
        "calls": ([{**USER, "tool_calls": "price()"}], "'tool_calls' must be a list of objects, not str"),
        "a name": ([{**USER, "name": 3}], "'name' must be a text, not int"),
        "bytes": ([{**USER, "sound": b"a"}], "holds what JSON cannot hold"),
        "an unknown field": ({"messages": [USER], "tool": []}, "is an object with 'messages', 'tool': give a string"),
        "tools": ({"messages": [USER], "tools": [3]}, "field 'tools' must be a list of objects, the JSON schemas"),
        "tools in half": ({"messages": [USER], "tools": "[{"}, "field 'tools' is a text that is not JSON"),
        "arguments": ({"messages": [USER], "chat_template_kwargs": ["a"]}, "must be an object of the chat template's"),
        "no messages": ({"messages": "price?"}, "field 'messages' must be a string or messages, not str"),
    }.values(),
)  # fmt: skip
def test_what_is_no_conversation_is_refused(value, message):
    with pytest.raises(RecordError) as error:
        model().prepare(["Two."], {"x": [value]})
    assert message in str(error.value)
    assert str(error.value).startswith("the prompt in row 0")


@pytest.mark.parametrize(
    ("template", "value", "message"),
    {
        "tools": (PLAIN, {"messages": [USER], "tools": [TOOL]}, "holds tools, which the tokenizer's chat template"),
        "an argument": (
            TEMPLATE,
            {"messages": [USER], "chat_template_kwargs": {"trese": True}},
            "holds the argument 'trese', which the tokenizer's chat template does not read: leave it out, or set",
        ),
        "a key": (PLAIN, [{**USER, "weight": 0}], "holds messages with 'weight', which the tokenizer's chat template"),
        "our own": (
            TEMPLATE,
            {"messages": [USER], "chat_template_kwargs": {"add_generation_prompt": False}},
            "gives the chat template 'add_generation_prompt', which is set for it: leave it out",
        ),
        "messages": (
            TEMPLATE,
            {"messages": [USER], "chat_template_kwargs": {"messages": []}},
            "gives the chat template 'messages', which is set for it",
        ),
        "a failure": ("{{ messages + 3 }}", [USER], "the chat template for the messages in row 0 failed (TypeError: "),
    }.values(),
)  # fmt: skip
def test_what_a_template_does_not_read_is_refused(template, value, message):
    with pytest.raises(RecordError) as error:
        model(template).prepare(["Two."], {"x": [value]})
    assert message in str(error.value)


def test_a_template_that_writes_whole_messages_reads_every_key():
    component = model("{% for m in messages %}{{ m | tojson }}<eos>{% endfor %}")
    assert '"weight": 2' in texts(component, [{**USER, "weight": 2}], "Two.")[0]


def test_what_is_empty_is_left_out():
    turn = {"role": "user", "content": "a", "name": None, "tool_calls": []}
    assert read_messages([turn], "x") == [{"role": "user", "content": "a"}]
    read = read_conversation({"messages": [turn], "tools": None, "chat_template_kwargs": " "}, "x")
    assert (read.tools, read.arguments) == ((), ())
    assert (read_tools(None, "x"), read_arguments(None, "x")) == ([], {})
    assert (read_tools("null", "x"), read_arguments(" null", "x")) == ([], {})
