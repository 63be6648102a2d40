"""What stands in a proposed system for parts of a program that the traces do not hold: tools and prompts."""

from dataclasses import dataclass
from typing import Any

from sysdpo_jax.components.base import RecordError


def recorded(*values: Any) -> Any:
    """Stand for what a program computed: training reads its values from the records. Called, it refuses."""
    raise RecordError(
        "the traces hold its values and not its code: name a function of your own as the node's tool to sample the "
        "system, or record the value"
    )


def stripped(text: str) -> str:
    """The text without space around it."""
    return str(text).strip()


@dataclass(frozen=True)
class MessagesPrompt:
    """Messages made of the parents' values, each as "role: template"."""

    parents: tuple[str, ...]
    messages: tuple[str, ...]

    def __call__(self, *values: Any) -> list[dict[str, str]]:
        """The messages. Raises `RecordError` for a value that is no text."""
        given = dict(zip(self.parents, values, strict=True))
        other = next((name for name, value in given.items() if not isinstance(value, str | int | float)), None)
        if other is not None:
            raise RecordError(f"{other!r} is no text, which the prompt's messages need: give text")
        split = [message.split(": ", 1) for message in self.messages]
        return [{"role": role, "content": text.format(**given)} for role, text in split]


def messages(parents: tuple[str, ...], messages: tuple[str, ...]) -> MessagesPrompt:
    """The prompt of a configuration's `settings: {prompt: {call: ...}}`. Raises `ValueError` for one without a role."""
    lacking = next((message for message in messages if ": " not in message), None)
    if lacking is not None:
        raise ValueError(f"the message {lacking[:40]!r} has no role: write 'user: ...'")
    return MessagesPrompt(tuple(parents), tuple(messages))
