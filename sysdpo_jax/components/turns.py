"""An assistant's turn as a chat template writes it behind a prompt: its text, and the token that closes it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import Conversation, render
from sysdpo_jax.components.sampled_text import added_tokens

# Contents that no template changes and that differ in every letter.
PROBES = ("0", "1")


class Closing(NamedTuple):
    """What a template writes behind the content of a turn: the text, its tokens, and the one that ends the turn."""

    text: str
    tokens: tuple[int, ...]
    ends: tuple[int, ...]


_known: WeakKeyDictionary[Any, tuple[Any, Closing | None]] = WeakKeyDictionary()


def closing(tokenizer: Any) -> Closing | None:
    """How the tokenizer's chat template closes an assistant's turn; None without a template or where it writes none.

    The end is the first special token behind the content or, without one, the first token that was added.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    if tokenizer not in _known or _known[tokenizer][0] != template:
        _known[tokenizer] = template, _read(tokenizer)
    return _known[tokenizer][1]


def turn_text(tokenizer: Any, prompt: str, asked: Conversation, turn: Mapping[str, Any], row: int) -> str:
    """What the template writes of the turn behind `prompt`, its text of what was asked with the turn's opening.

    A template may open the turn that it asks for otherwise than one that is there, as with `enable_thinking: false`,
    for which some write an empty block of thoughts into the prompt alone. What follows the opening is then the turn.
    Raises `RecordError` where the template refuses the turn, writes what was asked otherwise when a turn follows, or
    leaves a block open for the model to close, for which a message has no place.
    """
    whole = render(tokenizer, asked.followed_by(turn), row, False)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    texts = [
        render(tokenizer, asked.followed_by({"role": turn["role"], "content": probe}), row, False) for probe in PROBES
    ]
    opening = _common_start(texts)
    # Of templates that write a content twice, or nothing of it, this is no opening.
    once = len({text.removeprefix(opening + probe) for text, probe in zip(texts, PROBES, strict=True)}) == 1
    given = _common_start((prompt, render(tokenizer, asked, row, False)))
    if not once or len(opening) < len(given) or not (prompt.startswith(opening) and whole.startswith(opening)):
        raise RecordError(
            f"the chat template does not leave the prompt in row {row} as it is when the completion follows (it "
            "rewrites earlier turns): give that completion as a string"
        )
    if _is_open(prompt[len(opening) :]):
        raise RecordError(
            f"the chat template ends the prompt in row {row} with {prompt[len(opening) :]!r}, for the model to go on "
            "from, which a message does not: give that completion as a string that goes on from there"
        )
    return whole[len(opening) :]


def _is_open(text: str) -> bool:
    """Whether a block that begins with <name> in the text has no end there."""
    names = re.findall(r"<(\w+)>", text)
    return any(text.rfind(f"<{name}>") > text.rfind(f"</{name}>") for name in names)


def _common_start(texts: Sequence[str]) -> str:
    one, other = texts
    length = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(one, other, key=len) if length is None else one[:length]


def _read(tokenizer: Any) -> Closing | None:
    asked = Conversation(({"role": "user", "content": "a"},))
    turns = ({"role": "assistant", "content": probe} for probe in PROBES)
    try:
        texts = [render(tokenizer, asked.followed_by(turn), 0, False) for turn in turns]
    except RecordError:
        return None
    tail = _common_start([text[::-1] for text in texts])[::-1]
    if not all(text.removesuffix(tail).endswith(probe) for text, probe in zip(texts, PROBES, strict=True)):
        return None
    tokens = tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])
    added, special = added_tokens(tokenizer)
    ends = [token for token in tokens if token in special] or [token for token in tokens if token in added]
    return Closing(tail, tokens, tuple(ends[:1]))
