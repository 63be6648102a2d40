"""Prompts of a language model from its parents' values: a text, or the messages of a chat with the turns of a loop."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import MESSAGES, TOOL, TOOLS, is_messages, kind, read_tools
from sysdpo_jax.static import hold_tuples


@dataclass(frozen=True)
class TextPrompt:
    """A text with the parents' values in it; the turns of a loop are their values, each with a line break behind it.

    What a model sampled is text there, which is tokenized anew with what stands around it.

    Args:
        prompt: With parents in braces.
        parents: Their names, in the order of the node's.

    Raises:
        ValueError: For a prompt that is no template, or names none of the parents or another.
    """

    prompt: str
    parents: tuple[str, ...]

    def __post_init__(self) -> None:
        hold_tuples(self)
        _check(self.prompt, self.parents)

    def __call__(self, *values: Any) -> Any:
        given = dict(zip(self.parents, values, strict=True))
        if len(values) == 1 and self.prompt == f"{{{self.parents[0]}}}" and not is_turns(values[0]):
            # Messages as they are.
            return values[0]
        return filled(self.prompt, {name: lines(value) if is_turns(value) else value for name, value in given.items()})


@dataclass(frozen=True)
class ChatPrompt:
    """The messages of a chat: the user's and, for each earlier turn of a loop, the assistant's and the observations.

    What the model itself sampled keeps its tokens where the chat template writes it as it was, see `LanguageModel`.

    Args:
        prompt: What the user says, with parents in braces. Of "{name}" alone the value may be messages, or an object
            with "messages", as they are.
        parents: Names of the node's parents, in their order.
        turns: Name of the loop among the parents, whose value is its earlier turns; None outside a loop.
        assistant: Name of the loop's node whose values are the assistant's messages.
        observations: Names of the loop's nodes whose values the assistant is told after its own, in this order. What is
            no text is written as JSON; of None there is no message. Of an assistant's message with "tool_calls", as a
            `RemoteModel` gives it, each call is answered with its id: a single one by what was observed, several by a
            list with a value for each, or by as many observations.
        role: Whose messages these are: a tool's or, for a chat template that does not know tools, the user's.
        system: What stands before the user's message.
        tools: JSON schemas of functions for the chat template.

    Raises:
        ValueError: For a prompt as `TextPrompt`'s, a loop that is no parent, turns without an assistant, an assistant
            or observations without turns, another role, and tools that are no list of objects.
    """

    prompt: str
    parents: tuple[str, ...]
    turns: str | None = None
    assistant: str | None = None
    observations: tuple[str, ...] = ()
    role: Literal["tool", "user"] = TOOL
    system: str | None = None
    tools: str | Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        # As text: objects cannot be hashed.
        try:
            schemas = read_tools(self.tools if isinstance(self.tools, str) else list(self.tools), "ChatPrompt: tools")
        except RecordError as error:
            raise ValueError(str(error)) from None
        object.__setattr__(self, TOOLS, json.dumps(schemas) if schemas else "")
        hold_tuples(self)
        _check(self.prompt, tuple(name for name in self.parents if name != self.turns))
        if self.turns is not None and self.turns not in self.parents:
            raise ValueError(f"ChatPrompt: the loop {self.turns!r} is no parent ({', '.join(self.parents)}): add it")
        if (self.turns is None) != (self.assistant is None) or (self.turns is None and self.observations):
            raise ValueError(
                "ChatPrompt: turns names the loop, assistant its node that speaks and observations those that answer: "
                "give turns and assistant, or none of the three"
            )
        if self.role not in (TOOL, "user"):
            raise ValueError(f"ChatPrompt: role {self.role!r} is neither {TOOL!r} nor 'user'")

    def __call__(self, *values: Any) -> Any:
        """Make the messages.

        Args:
            values: Of the parents, in their order.

        Returns:
            The messages, or an object of them and the tools.

        Raises:
            RecordError: For a value that does not fit, and what the messages that came have already.
        """
        given = dict(zip(self.parents, values, strict=True))
        turns = [] if self.turns is None else given.pop(self.turns)
        if not is_turns(turns):
            raise RecordError(f"the value of the loop {self.turns!r} must be a list of turns, not {kind(turns)}")
        asked = self._asked(given)
        messages = [*asked[MESSAGES], *(message for turn in turns for message in self._turn(turn))]
        if self.system is not None:
            if any(message["role"] == "system" for message in messages):
                raise RecordError("the messages have a system's message already: leave `system` out, or that message")
            messages = [{"role": "system", "content": self.system}, *messages]
        made = asked | {MESSAGES: messages}
        if self.tools:
            if asked.get(TOOLS):
                raise RecordError("the prompt has tools already: leave `tools` out, or those")
            made[TOOLS] = self.tools
        return messages if list(made) == [MESSAGES] else made

    def _asked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The user's message, or the conversation that takes its place."""
        alone: Any = next((value for name, value in given.items() if self.prompt == f"{{{name}}}"), None)
        if is_messages(alone):
            return {MESSAGES: list(alone)}
        if isinstance(alone, Mapping) and is_messages(alone.get(MESSAGES)):
            return dict(alone)
        return {MESSAGES: [{"role": "user", "content": filled(self.prompt, given)}]}

    def _turn(self, turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        lacking = [name for name in (str(self.assistant), *self.observations) if name not in turn]
        if lacking:
            raise RecordError(
                f"a turn of {self.turns!r} lacks {lacking[0]!r} (it has {', '.join(turn)}): name what every turn has"
            )
        said: Any = turn[str(self.assistant)]
        spoken = list(said) if is_messages(said) else [{"role": "assistant", "content": said}]
        seen = {name: turn[name] for name in self.observations if turn[name] is not None}
        told = [{"role": self.role, "content": as_text(value, name)} for name, value in seen.items()]
        calls = spoken[-1].get("tool_calls")
        return [*spoken, *(self._answers(calls, seen) if calls and self.role == TOOL else told)]

    def _answers(self, calls: Sequence[Mapping[str, Any]], seen: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A message for each call, which says by its id what it answers."""
        told = list(seen.items())
        if len(calls) > 1 and len(told) == 1 and isinstance(told[0][1], list | tuple):
            told = [(told[0][0], value) for value in told[0][1]]
        if len(told) != len(calls):
            raise RecordError(
                f"a turn of {self.turns!r} has {len(calls)} calls of tools and {len(told)} answers: name an observa"
                "tion that is a list with a value for each call, as `Functions` gives it"
            )
        ids = [{"tool_call_id": call["id"]} if call.get("id") else {} for call in calls]
        pairs = zip(ids, told, strict=True)
        return [{"role": TOOL, **own, "content": as_text(value, name)} for own, (name, value) in pairs]


def filled(prompt: str, given: Mapping[str, Any]) -> str:
    """The prompt with values in the place of their names. Raises `RecordError` for what is neither text nor number."""
    other = [name for name, value in given.items() if not isinstance(value, str | int | float)]
    if other:
        raise RecordError(
            f"{other[0]!r} is no text, which the prompt {prompt!r} needs: leave the prompt out, or give text, as a "
            "tool between them may make"
        )
    return prompt.format(**given)


def is_turns(value: Any) -> bool:
    """Whether a value is a list of a loop's turns, as its nodes read it; one of none is."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and all(isinstance(turn, Mapping) and "role" not in turn for turn in value)


def lines(turns: Sequence[Mapping[str, Any]]) -> str:
    """The values of turns, each with a line break behind it."""
    return "".join(f"{as_text(value, name)}\n" for turn in turns for name, value in turn.items())


def as_text(value: Any, name: str) -> str:
    """A text as it is, anything else as JSON. name: of the value, for the error about what JSON cannot hold."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise RecordError(
            f"{name!r} is {type(value).__name__}, which no message can hold ({error}): let the tool return a text"
        ) from None


def named_in(prompt: str) -> set[str]:
    """The names in braces in a prompt. Raises `ValueError` for one that is no template."""
    try:
        return {part for _, part, _, _ in Formatter().parse(prompt) if part is not None}
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r} is no template ({error}): write braces as {{{{ and }}}}") from None


def _check(prompt: str, parents: tuple[str, ...]) -> None:
    wanted = named_in(prompt)
    if not wanted or not wanted <= set(parents):
        raise ValueError(
            f"prompt {prompt!r} must name parents in braces ({', '.join(parents)}): it names "
            f"{', '.join(map(repr, sorted(wanted))) or 'none'}"
        )
