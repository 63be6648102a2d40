"""What models are asked and answer, out of the many forms in which programs record it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sysdpo_jax.traces.spans import LLM, Span, at, parsed, texts

# LangChain's names of roles, and those of others.
ROLES = {"human": "user", "ai": "assistant", "HumanMessage": "user", "AIMessage": "assistant", "model": "assistant"}
ROLES |= {"SystemMessage": "system", "ToolMessage": "tool", "developer": "system"}
# Where responses say why they ended, and where within them that stands.
ENDINGS = ("finish_reason", "finish_reasons", "stop_reason", "finishReason", "done_reason")
WITHIN = (
    *("choices", "generations", "candidates", "message", "completion", "kwargs", "response_metadata"),
    *("generation_info", "llm_output", "output", "response", "data"),
)
# Keys of a message that chat templates read beside its role, content and calls of tools.
KEPT = ("tool_call_id", "name")
# Parts of a content that are calls of tools, of OpenTelemetry and of Anthropic.
CALLS = ("tool_call", "tool_use")


class NoText(ValueError):
    """Something is no text, which a language model's value must be: the message says what it is."""


def content_text(content: Any) -> str:
    """The text of a message's content: a text, or a list of parts of text. Raises `NoText` for pictures and others."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise NoText(f"a content that is {type(content).__name__}")
    return "".join(_part_text(part) for part in content)


def message_of(value: Any) -> dict[str, Any]:
    """One message. Raises `NoText` for what is none, and for contents other than text."""
    value = parsed(value)
    if isinstance(value, Mapping) and "kwargs" in value:
        # As LangChain serializes objects.
        names = value.get("id")
        value = {"type": names[-1] if isinstance(names, list) and names else "", **value["kwargs"]}
    if _is_pair(value):
        value = {"role": value[0], "content": value[1]}
    if not isinstance(value, Mapping):
        raise NoText(f"a message that is {type(value).__name__}")
    data = value["data"] if isinstance(value.get("data"), Mapping) else {}
    value = {**data, **value}
    role = str(value.get("role") or value.get("type") or "")
    content = value["parts"] if "parts" in value else value.get("content")
    calls = [part for part in content if at(part, "type") in CALLS] if isinstance(content, list) else []
    rest = [part for part in content if part not in calls] if isinstance(content, list) else content
    made = {"role": ROLES.get(role, role), "content": content_text(rest)}
    extra = {key: value[key] for key in KEPT if value.get(key)}
    calls = value.get("tool_calls") or calls or at(value, "additional_kwargs", "tool_calls") or []
    if calls:
        extra["tool_calls"] = [_call(each) for each in calls]
    return made | extra


def messages_of(value: Any) -> list[dict[str, Any]] | str | None:
    """A prompt: messages, or a text; None where a value holds neither. Raises `NoText`."""
    value = parsed(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        for name in ("messages", "prompts", "prompt", "input", "contents"):
            if value.get(name):
                return messages_of(value[name])
        return [message_of(value)] if "content" in value else None
    if not isinstance(value, Sequence) or not value:
        return None
    if len(value) == 1 and isinstance(value[0], list | str) and not _is_pair(value[0]):
        # A batch of one.
        return messages_of(value[0])
    return [message_of(item) for item in value]


def answer_of(value: Any) -> str | list[dict[str, Any]]:
    """What a model answered: a text, or a list of the one message that has calls of tools, as a `RemoteModel` gives it.

    Raises `NoText` for several answers, and what is no answer.
    """
    value = parsed(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) != 1:
            raise NoText(f"{len(value)} answers" if value else "no answer")
        return answer_of(value[0])
    if not isinstance(value, Mapping):
        raise NoText("no answer")
    if value.get("tool_calls") and value.get("text"):
        value = {**value, "content": value["text"], "text": None}
    for name in ("choices", "generations", "message", "text", "completion"):
        if value.get(name) and name in value:
            return answer_of(value[name])
    if "content" in value or "parts" in value or "kwargs" in value or value.get("tool_calls"):
        message = message_of(value)
        if not message.get("tool_calls"):
            return str(message["content"])
        kept = {name: message[name] for name in ("content", "tool_calls") if message[name]}
        return [{"role": "assistant", **kept}]
    for name in ("output", "answer", "response"):
        if name in value:
            return answer_of(value[name])
    raise NoText("no answer")


def ids_of(response: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The token ids of prompt and answer in a response of vLLM that was asked for them (`return_token_ids`)."""
    response = parsed(response)
    choices = at(response, "choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    prompt = at(response, "prompt_token_ids") or at(choice, "prompt_token_ids")
    return _ids(prompt), _ids(at(choice, "token_ids"))


def finish_of(response: Any) -> str:
    """Why the first answer of a response ended, in the words of its server; "" where it does not say."""
    response = parsed(response)
    if isinstance(response, list):
        return finish_of(response[0]) if response else ""
    if not isinstance(response, Mapping):
        return ""
    # Of OpenAI's API of responses.
    reasons = [at(response, "incomplete_details", "reason"), *(response.get(name) for name in ENDINGS)]
    for reason in reasons:
        said = reason[0] if isinstance(reason, list) and reason else reason
        if isinstance(said, str) and said:
            return said
    return next((found for name in WITHIN if (found := finish_of(response.get(name)))), "")


def with_texts(span: Span, prompt: Any, answer: Any, tools: Any = None) -> Span:
    """An LLM's span with its prompt and answer in one form, or with the reason why they have none."""
    try:
        asked, said = messages_of(prompt), answer_of(answer)
    except NoText as error:
        return replace(span, refused=str(error))
    if span.kind == LLM and not asked:
        return replace(span, refused="no prompt")
    if tools and isinstance(asked, list):
        return replace(span, prompt={"messages": asked, "tools": tools}, answer=said)
    return replace(span, prompt=asked, answer=said)


def output_text(span: Span) -> str:
    """The value of a tool or a retriever; of a tool's message, as LangChain's tools give it, the content."""
    output = span.output
    if output is None:
        return "\n".join(span.documents or ())
    if "tool" in (at(output, "type"), at(output, "kwargs", "type"), at(output, "role")):
        try:
            return str(message_of(output)["content"])
        except NoText:
            return texts(output)
    return texts(output)


def document_text(document: Any) -> str:
    """The text of a retrieved document, in the names that frameworks give it."""
    if isinstance(document, Mapping):
        document = document["kwargs"] if isinstance(document.get("kwargs"), Mapping) else document
        for name in ("content", "page_content", "text", "document"):
            if name in document:
                return document_text(document[name])
    return document if isinstance(document, str) else str(document)


def _call(call: Any) -> dict[str, Any]:
    """A call in the form of OpenAI's API, its arguments as the object that chat templates write."""
    own = at(call, "function") or call
    given: Any = next((own[name] for name in ("arguments", "args", "input") if at(own, name) is not None), {})
    if not at(own, "name"):
        raise NoText("a call of a tool without a name")
    name = {"id": call["id"]} if call.get("id") else {}
    return {**name, "type": "function", "function": {"name": own["name"], "arguments": parsed(given) or {}}}


def _is_pair(value: Any) -> bool:
    """Whether a value is a message as (role, content)."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = at(part, "type")
    text = at(part, "text") if at(part, "text") is not None else at(part, "content")
    if kind in (None, "text", "input_text", "output_text") and isinstance(text, str):
        return text
    if kind == "tool_call_response":
        result = at(part, "response") if at(part, "response") is not None else at(part, "result")
        return result if isinstance(result, str) else str(result)
    raise NoText(f"a part of the type {kind!r}, which is no text")


def _ids(value: Any) -> tuple[int, ...] | None:
    ids = isinstance(value, list) and value and all(type(token) is int for token in value)
    return tuple(value) if ids else None
