"""Conversations as files hold them -> what a chat template is given: messages, tools, and arguments of its own.

Everything that reads messages reads them here, so that a template sees the same of every reader, and of sampling.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, Final, TypeVar

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.user_code import user_code
from sysdpo_jax.values import TEXT, TOKENS, sampled_fault

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
# What writes messages as the chat template does.
Write = Callable[[Messages], str]

# The names of a conversation with more than messages; the last two are TRL's columns too.
MESSAGES, TOOLS, ARGUMENTS = "messages", "tools", "chat_template_kwargs"
# The role of a message that holds what a tool answered.
TOOL: Final = "tool"
TOOL_REMEDY = "give them the role 'user' (in YAML observations: user), or set another tokenizer.chat_template"
# Keys of a message that are texts wherever they are known; of others the template alone knows the type.
TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    messages: each with a "role" and a "content" that is one text, or "tool_calls" without a content. tools: schemas of
    functions. arguments: of the template by name, as "enable_thinking".
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()

    def followed_by(self, *messages: Mapping[str, Any]) -> "Conversation":
        """The conversation with more messages."""
        return replace(self, messages=(*self.messages, *messages))


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and len(value) > 0 and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def read_conversation(value: Any, what: str) -> Conversation:
    """A list of messages, or {"messages": [...], "tools": [...], "chat_template_kwargs": {...}} of which two may lack.

    what: names the value, for errors. Raises `RecordError` for another value, naming the message and its field.
    """
    if not isinstance(value, Mapping):
        return Conversation(tuple(read_messages(value, what)))
    unknown = [name for name in value if name not in (MESSAGES, TOOLS, ARGUMENTS)]
    if MESSAGES not in value or unknown:
        has = f"an object with {', '.join(map(repr, value)) or 'nothing'}"
        raise RecordError(
            f"{what} is {has}: give a string, messages, or an object with {MESSAGES!r}, {TOOLS!r} and {ARGUMENTS!r}"
        )
    messages = read_messages(value[MESSAGES], f"{what}, field {MESSAGES!r}")
    tools = read_tools(value.get(TOOLS), f"{what}, field {TOOLS!r}")
    arguments = read_arguments(value.get(ARGUMENTS), f"{what}, field {ARGUMENTS!r}")
    return Conversation(tuple(messages), tuple(tools), tuple(arguments.items()))


def read_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """The messages with each content as one text: text parts are put together; what is empty beside it is left out.

    Raises `RecordError` naming the message and its field.
    """
    if not is_messages(value):
        raise RecordError(f"{what} must be a string or messages, not {kind(value)}")
    return [_message(turn, f"{what}, message {number}") for number, turn in enumerate(value)]


def read_tools(value: Any, what: str) -> list[Mapping[str, Any]]:
    """Schemas of functions from a list or its JSON, as tables hold it. Raises `RecordError` for anything else."""
    tools = _from_json(value, what, [])
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(f"{what} must be a list of objects, the JSON schemas of functions, not {kind(tools)}")
    return _json(tools, what)


def read_arguments(value: Any, what: str) -> dict[str, Any]:
    """Arguments of a chat template from an object or its JSON. Raises `RecordError` for anything else."""
    arguments = _from_json(value, what, {})
    if not isinstance(arguments, Mapping):
        raise RecordError(f"{what} must be an object of the chat template's arguments, not {kind(arguments)}")
    return dict(_json(arguments, what))


def render(tokenizer: Any, conversation: Conversation, row: int, awaits_turn: bool) -> str:
    """The conversation as the tokenizer's chat template writes it, with all special tokens.

    Raises `RecordError` naming the row where there is no template, where it refuses or fails, and for whatever of the
    conversation it does not read.
    """
    # Imported late: only templates need it.
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise RecordError(
            f"row {row} holds messages but the tokenizer has no chat template: set tokenizer.chat_template, or give a "
            "string"
        )
    if conversation.arguments:
        _check_names(tokenizer, dict(conversation.arguments), row)
    write = _writer(tokenizer, conversation, awaits_turn)
    # A template is a program of the model's makers, which may fail in any way on what it was not written for.
    what = f"the chat template for the messages in row {row}"
    remedy = "edit them, or set another tokenizer.chat_template"
    try:
        with user_code(what, RecordError, (RecordError, TemplateError), remedy):
            template = str(tokenizer.get_chat_template(tools=list(conversation.tools) or None))
            text = write(conversation.messages)
            unread = _unread(conversation, template, text, write)
    except TemplateError as error:
        if _tells(conversation.messages) and _attempt(write, _in_role(conversation.messages, "user")) is not None:
            raise RecordError(
                f"the chat template refuses messages of the role {TOOL!r} in row {row} ({error}): {TOOL_REMEDY}"
            ) from error
        raise RecordError(f"the chat template refuses the messages in row {row}: {error}") from error
    if unread is not None:
        raise RecordError(
            f"row {row} holds {unread}, which the tokenizer's chat template does not read: leave it out, or set a "
            "tokenizer.chat_template that reads it"
        )
    if _tells(conversation.messages) and _ignores_tools(conversation.messages, text, write):
        raise RecordError(
            f"row {row} holds messages of the role {TOOL!r}, which the tokenizer's chat template does not know: "
            f"{TOOL_REMEDY}"
        )
    return text


def rendered_start(tokenizer: Any, conversation: Conversation, messages: int) -> str | None:
    """So many messages of a conversation that `render` has written, as they stood while the next one was awaited.

    None where the template refuses them, or fails.
    """
    return _attempt(_writer(tokenizer, conversation, True), conversation.messages[:messages])


def kind(value: Any) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        inner = {type(item).__name__ for item in value}
        without = [place for place, item in enumerate(value) if isinstance(item, Mapping) and "role" not in item]
        why = "a message has a 'role' and a 'content'"
        if without:
            why += f"; message {without[0]} has {', '.join(map(repr, value[without[0]])) or 'nothing'}"
        return f"a list of {' and '.join(sorted(inner)) or 'nothing'} ({why})"
    if isinstance(value, Mapping) and {TEXT, TOKENS} <= set(value):
        return f"an object ({sampled_fault(value)})"
    return type(value).__name__


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Tables have a place for every key of every message, and templates would write what is empty there as "None".
    kept = {key: value for key, value in turn.items() if not (value is None or (value == [] and key != "content"))}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise RecordError(f"{where}: the role is {turn['role']!r}: give a text such as 'user'")
    calls = kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise RecordError(f"{where}: 'tool_calls' must be a list of objects, not {kind(calls)}")
    for key in TEXT_KEYS:
        if not isinstance(kept.get(key, ""), str):
            raise RecordError(f"{where}: {key!r} must be a text, not {type(kept[key]).__name__}")
    if "content" in kept:
        kept["content"] = _one_text(kept["content"], where)
    elif calls is None:
        raise RecordError(f"{where} has no content: give a text, or 'tool_calls'")
    return _json(kept, where)


def _one_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise RecordError(f"{where}: the content is {kind(content)}: give a text, or a list of text parts")
    return "".join(_text_part(part, f"{where}, part {number}") for number, part in enumerate(content))


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise RecordError(f'{where} is {type(part).__name__}: give {{"type": "text", "text": ...}}')
    if part.get("type") != "text":
        raise RecordError(
            f"{where} is of the type {part.get('type')!r}, and a language model reads the type 'text' alone: drop the "
            "row, or give the other part to a component that reads it"
        )
    unknown = [key for key, value in part.items() if key not in ("type", "text") and value is not None]
    if unknown:
        raise RecordError(f"{where} has the field {unknown[0]!r}, which nothing reads: leave it out")
    if not isinstance(part.get("text"), str):
        raise RecordError(f"{where}: 'text' must be a text, not {type(part.get('text')).__name__}")
    return str(part["text"])


def _from_json(value: Any, what: str, empty: Any) -> Any:
    """The value, or that of a text; `empty` for none and for a text of nothing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return empty
    if not isinstance(value, str):
        return value
    try:
        made = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what} is a text that is not JSON ({error}): write it as JSON, or as objects") from None
    return empty if made is None else made


def _json(value: T, where: str) -> T:
    """The value; what JSON cannot hold would reach the text as Python writes it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where} holds what JSON cannot hold ({error}): give texts, numbers and lists") from None
    return value


def _check_names(tokenizer: Any, arguments: Mapping[str, Any], row: int) -> None:
    """Refuses arguments of `apply_chat_template` that are not the template's."""
    known = signature(tokenizer.apply_chat_template).parameters.values()
    own = {p.name for p in known if p.kind is not Parameter.VAR_KEYWORD} - {"documents"} | {MESSAGES}
    taken = [name for name in arguments if name in own]
    if taken:
        raise RecordError(
            f"row {row} gives the chat template {taken[0]!r}, which is set for it: leave it out of {ARGUMENTS!r}"
        )


def _unread(conversation: Conversation, template: str, text: str, write: Write) -> str | None:
    """What of the conversation leaves no trace in the text, because the template does not even name it."""

    def named(name: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template) is not None

    if conversation.tools and not named(TOOLS):
        return TOOLS
    for name, _ in conversation.arguments:
        if not named(name):
            return f"the argument {name!r}"
    # Which call an answer is of templates that leave the id out say by the order.
    known = ("role", "content", "tool_call_id")
    for key in dict.fromkeys(key for turn in conversation.messages for key in turn if key not in known):
        # A template may write whole messages, without the names of their keys.
        if not named(key) and text == write(
            [{name: value for name, value in turn.items() if name != key} for turn in conversation.messages]
        ):
            return f"messages with {key!r}"
    return None


def _writer(tokenizer: Any, conversation: Conversation, awaits_turn: bool) -> Write:
    """What writes messages with the tools and arguments of a conversation."""
    tools, arguments = list(conversation.tools) or None, dict(conversation.arguments)

    def write(messages: Messages) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=awaits_turn, **arguments
            )
        )

    return write


def _attempt(write: Write, messages: Messages) -> str | None:
    """The text of messages; None where the template does not write them."""
    try:
        return write(messages)
    except Exception:
        # Templates fail in any way on what they were not written for.
        return None


def _tells(messages: Messages) -> bool:
    """Whether a message is of a tool."""
    return any(turn["role"] == TOOL for turn in messages)


def _in_role(messages: Messages, role: str) -> list[Mapping[str, Any]]:
    """The messages with another role in the place of a tool's."""
    return [{**turn, "role": role} if turn["role"] == TOOL else turn for turn in messages]


def _ignores_tools(messages: Messages, text: str, write: Write) -> bool:
    """Whether the text says nothing of what tools answered, or says it as the assistant's."""
    told = [{**turn, "content": f"{turn.get('content', '')}0"} if turn["role"] == TOOL else turn for turn in messages]
    return text in (_attempt(write, told), _attempt(write, _in_role(messages, "assistant")))
