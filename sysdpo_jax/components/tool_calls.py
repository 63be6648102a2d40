"""Calls of tools in what a model wrote, and functions that answer them."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.chat_prompt import as_text
from sysdpo_jax.errors import meant
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.user_code import name_of

# What comes before calls: of Hermes, Qwen and SmolLM2, of Mistral, and of Llama 3, which also writes them bare.
HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
# Between name and arguments of Mistral's newer calls.
ARGS = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?={)")


class ToolCall(NamedTuple):
    """A call as a model wrote it.

    Attributes:
        name: Of the function.
        arguments: By name.
    """

    name: str
    arguments: dict[str, Any]


def tool_calls(said: str | Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    """Read the calls of tools in what a model said, in their order.

    Args:
        said: A list of messages, as a `RemoteModel` gives it, with "tool_calls" or with such a text as their content.
            Or a text with calls as Hermes and Qwen write them
            (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`), as Mistral does (`[TOOL_CALLS]` and a list of
            such objects, or `name[ARGS]{...}`), or as Llama 3 does: an object with "name" and "parameters" is all of
            the text, or several behind each other with `;`.

    Returns:
        The calls; none where the text has nothing of these forms.

    Raises:
        RecordError: For a call that is not JSON, is cut, or has no name or no object of arguments.
    """
    return [_call(value, number) for number, value in enumerate(_found(said))]


@dataclass(frozen=True)
class Functions:
    """What answers a model's calls of tools, for `Tool`: `Tool(Functions((search, add)))`.

    Of a text with calls it is what their functions return, texts as they are and all else as JSON, each on lines of its
    own; of messages with "tool_calls" that of the only call, or a list with that of each; without calls "". What the
    model did wrong it is told, as "error: ...": a call that cannot be read, a function that does not exist, arguments
    that it does not take, and what a function raises as `RecordError`. Anything else that a function raises is a
    failure of the tool.

    Args:
        functions: Called by their own names.

    Raises:
        ValueError: For two of one name, and what has no name.
    """

    functions: tuple[Callable[..., Any], ...]

    def __post_init__(self) -> None:
        hold_tuples(self)
        names = [getattr(function, "__name__", None) for function in self.functions]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"Functions: {names} must be functions with names of their own")
        # The name by which errors and kept values know the tool: another table is another tool.
        object.__setattr__(
            self, "__qualname__", f"Functions({', '.join(map(name_of, self.functions))})".replace(":", ".")
        )

    def __call__(self, said: str | Sequence[Mapping[str, Any]]) -> str | list[str]:
        """Answer the calls in what a model said.

        Args:
            said: A text, or a list of messages.

        Returns:
            What the functions returned, or what was wrong: of several calls in messages a list.
        """
        calls = _listed(said)
        if calls:
            # One that cannot be read has an id all the same, which must be answered.
            answers = [self._told(call, number) for number, call in enumerate(calls)]
            return answers[0] if len(answers) == 1 else answers
        try:
            return "\n".join(self._answer(*call) for call in tool_calls(said))
        except RecordError as error:
            return f"error: {error}"

    def _told(self, call: Any, number: int) -> str:
        try:
            return self._answer(*_call(call, number))
        except RecordError as error:
            return f"error: {error}"

    def _answer(self, name: str, arguments: dict[str, Any]) -> str:
        known = {function.__name__: function for function in self.functions}
        if name not in known:
            return f"error: there is no tool {name!r}: {meant(name, known)}"
        try:
            inspect.signature(known[name]).bind(**arguments)
        except TypeError as error:
            return f"error: {name} cannot be called so: {error}"
        try:
            return as_text(known[name](**arguments), name)
        except RecordError as error:
            return f"error: {error}"


def _listed(said: str | Sequence[Mapping[str, Any]]) -> list[Any]:
    """The "tool_calls" of messages, each without what OpenAI's API puts around it."""
    calls = [] if isinstance(said, str) else [call for message in said for call in message.get("tool_calls") or ()]
    return [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]


def _found(said: str | Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The JSON of each call."""
    calls = _listed(said)
    text = said if isinstance(said, str) else "\n".join(str(message.get("content") or "") for message in said)
    if calls:
        yield from calls
    elif HERMES in text:
        for part in text.split(HERMES)[1:]:
            # What ended at "</tool_call>" does not hold it.
            yield _json(part.split("</tool_call>")[0])[0]
    elif MISTRAL in text:
        for part in text.split(MISTRAL)[1:]:
            named = ARGS.match(part)
            if named is not None:
                yield {"name": named[1], "arguments": _json(part[named.end() :])[0]}
                continue
            listed = _json(part)[0]
            yield from listed if isinstance(listed, list) else [listed]
    else:
        rest = text.strip().removeprefix(LLAMA).strip()
        # Without a mark: other texts may begin with a brace.
        marked = LLAMA in text or re.match(r'{\s*"(type|name|parameters)"\s*:', rest) is not None
        while marked and rest:
            value, rest = _json(rest)
            yield value
            rest = rest.removeprefix(";").strip()


def _json(text: str) -> tuple[Any, str]:
    """The value that a text begins with, and what follows it."""
    text = text.strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"a tool call is not JSON ({error}): {text[:80]!r}") from None
    return value, text[end:].strip()


def _call(value: Any, number: int) -> ToolCall:
    what = f"tool call {number}"
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise RecordError(f"{what} must be an object with a 'name', not {json.dumps(value)[:80]}")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        # As OpenAI's API has them, where there may be none.
        arguments = _json(arguments)[0] if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RecordError(f"{what}, of {value['name']!r}: the arguments must be an object, not {arguments!r}")
    return ToolCall(value["name"], arguments)
