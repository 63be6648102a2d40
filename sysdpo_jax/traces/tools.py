"""What stands in a proposed system for parts of a program that the traces do not hold: tools and prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.chat_prompt import filled, named_in
from sysdpo_jax.errors import meant
from sysdpo_jax.traces.graph import TOLD


def recorded(*values: Any) -> Any:
    """Stand for what a program computed: training reads its values from the records. Called, it refuses."""
    raise RecordError(
        "the traces hold its values and not its code: name a function of your own as the node's tool to sample the "
        "system, or record the value"
    )


def finished(turn: Mapping[str, Any]) -> bool:
    """Whether a turn of an agent was its last one: it called no tool."""
    return bool(turn[TOLD] == "")


def stripped(text: str) -> str:
    """The text without space around it."""
    return str(text).strip()


@dataclass(frozen=True)
class MessagesPrompt:
    """Several messages made of the parents' values, each as "role: template".

    A user's message, with a system's before it that is always the same, is a `ChatPrompt`.
    """

    parents: tuple[str, ...]
    messages: tuple[str, ...]

    def __call__(self, *values: Any) -> list[dict[str, str]]:
        """The messages. Raises `RecordError` for a value that is no text."""
        given = dict(zip(self.parents, values, strict=True))
        split = [message.split(": ", 1) for message in self.messages]
        return [{"role": role, "content": filled(text, given)} for role, text in split]


def messages(parents: tuple[str, ...], messages: tuple[str, ...]) -> MessagesPrompt:
    """The prompt of a configuration's `settings: {prompt: {call: ...}}`.

    Raises `ValueError` for a message without a role, or with a name that is no parent.
    """
    for message in messages:
        role, colon, text = message.partition(": ")
        if not colon:
            raise ValueError(f"the message {message[:40]!r} has no role: write 'user: ...'")
        unknown = sorted(named_in(text) - set(parents))
        if unknown:
            raise ValueError(
                f"the {role}'s message names {unknown[0]!r}, which is no parent: {meant(unknown[0], parents)}"
            )
    return MessagesPrompt(tuple(parents), tuple(messages))
