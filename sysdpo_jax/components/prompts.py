"""Prompts and completions as token ids: what a tokenizer adds by itself, chat templates, and texts that are too long.

All functions run on the host and raise `RecordError` that names the row. Those that need token ids are generators: they
yield the texts to tokenize, and `tokenized` runs the rows of a batch side by side, so that the tokenizer is called with
many texts at a time.
"""

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args
from weakref import WeakKeyDictionary

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import (
    Conversation,
    is_messages,
    kind,
    read_conversation,
    read_messages,
    render,
    rendered_start,
)
from sysdpo_jax.components.sampled_text import facts_of, own_tokens
from sysdpo_jax.values import SampledText

# What becomes of a text without room: refused, or a prompt keeps its first or its last tokens.
Truncation = Literal["error", "keep_start", "keep_end"]
TRUNCATIONS = get_args(Truncation)
# In front of a text that is tokenized apart from its prompt, so that it does not begin as the first of a text does.
BEFORE = ("\n", ".", "a")
# Contents of a turn that no template changes and that differ in every letter.
PROBES = ("0", "1")

T = TypeVar("T")
# A text, and whether the tokenizer adds its special tokens to it.
TokenizerInput = tuple[str, bool]
# What yields questions, is sent the token ids of each, which it must not change, and returns a T.
Tokenizing = Generator[TokenizerInput, list[int], T]


def tokenized(tokenizer: Any, rows: Iterable[Tokenizing[T]]) -> list[T]:
    """What each row returns. The rows' questions are answered together, a round at a time, equal ones once.

    Raises what the first of the failing rows raises.
    """
    running = dict(enumerate(rows))
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}
    known: dict[TokenizerInput, list[int]] = {}
    asked: dict[int, TokenizerInput] = {}
    while running:
        for row, work in list(running.items()):
            try:
                asked[row] = work.send(known[asked[row]]) if row in asked else next(work)
                continue
            except StopIteration as stop:
                results[row] = stop.value
            except Exception as error:
                errors[row] = error
            del running[row]
        for special in (True, False):
            new = {asked[row]: None for row in running if asked[row][1] == special and asked[row] not in known}
            if new:
                made = tokenizer([text for text, _ in new], add_special_tokens=special)["input_ids"]
                known.update(zip(new, map(list, made), strict=True))
    if errors:
        raise errors[min(errors)]
    return [results[row] for row in sorted(results)]


class Prompt(NamedTuple):
    """What a model goes on from: the text, its ids alone, those that the model is given, and its conversation.

    These hold what the tokenizer adds to a string, and the own ids of turns that were sampled. retokenized: whether a
    turn that was sampled has others.
    """

    text: str
    plain: list[int]
    ids: list[int]
    asked: Conversation | None
    retokenized: bool


class CompletionIds(NamedTuple):
    """Token ids of a completion, and whether they are others than those that a model would have made of the text.

    They are where a text came from a model with another tokenizer or was edited since, and where the end of the prompt
    and the beginning of the completion are one token when both are one text.
    """

    ids: list[int]
    retokenized: bool


class Closing(NamedTuple):
    """What a template writes behind the content of a turn: the text, its tokens, and the one that ends the turn."""

    text: str
    tokens: tuple[int, ...]
    ends: tuple[int, ...]


_known: WeakKeyDictionary[Any, tuple[Any, Closing | None]] = WeakKeyDictionary()


def prompt_ids(tokenizer: Any, prompt: Any, row: int) -> Tokenizing[Prompt]:
    """Token ids of a string as the tokenizer makes them by default, or of a conversation that awaits the next turn.

    Of a string's ids, a start that the text holds already is not put before it again, and an end that the tokenizer
    puts after every text is left out, because the text goes on. A conversation's are those of `_turns_with_own_ids`.
    """
    if isinstance(prompt, str):
        plain = yield prompt, False
        return Prompt(prompt, plain, (yield from _open_text(tokenizer, prompt, plain, row)), None, False)
    asked = read_conversation(prompt, f"the prompt in row {row}")
    text = render(tokenizer, asked, row, True)
    plain = yield text, False
    ids, retokenized = yield from _turns_with_own_ids(tokenizer, asked, text)
    return Prompt(text, plain, ids, asked, retokenized)


def completion_ids(
    tokenizer: Any, prompt: Prompt, value: Any, ends: Sequence[int], room: int, row: int
) -> Tokenizing[CompletionIds]:
    """Token ids of a text, or of the one message that follows the prompt's, with one end.

    What a model made with this tokenizer keeps the ids that it made. Other texts are tokenized behind the text of their
    prompt, as what follows there: after messages as the chat template writes them as an assistant's turn, up to the
    token that closes it, or as they are where the template writes no such turn.
    """
    if isinstance(value, SampledText) and (own := own_tokens(tokenizer, value)) is not None:
        return CompletionIds(own, False)
    text, is_turn = _completion_text(tokenizer, prompt, value, row)
    ids, merged = yield from following(tokenizer, prompt, text)
    closed = closing(tokenizer) if prompt.asked is not None else None
    end = next((token for token in closed.tokens if token in ends), None) if closed is not None else None
    if is_turn:
        ids = _up_to_the_end(ids, text, closed, end, ends)
    # The text may hold its end already.
    while len(ids) > 1 and ids[-1] in ends and ids[-2] in ends:
        ids = ids[:-1]
    if not ids or ids[-1] not in ends:
        ids = [*ids, ends[0] if end is None else end]
    # One that fills its room has no end, as sampling stops there too: its probability is that of being cut.
    return CompletionIds(ids[:room] if len(ids) == room + 1 else ids, merged or isinstance(value, SampledText))


def check_vocabulary(tokenizer: Any, ids: Sequence[int], vocab_size: int, what: str, row: int) -> None:
    """Raise `RecordError` for an id that the decoder has no embedding for; it would be read as another token."""
    token = next((token for token in ids if token >= vocab_size), None)
    if token is not None:
        raise RecordError(
            f"the {what} in row {row} holds the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), but the "
            f"decoder knows ids below {vocab_size}: leave it out, or give the tokenizer that belongs to the decoder"
        )


def fitted(
    ids: list[int], room: int, truncation: Truncation, what: str, setting: str, row: int, start: int | None = None
) -> tuple[list[int], bool]:
    """The ids that fit in `room`, and whether any were cut. Raises on none at all, and on too many under "error".

    start: token that "keep_end" keeps in front if it is there, and of the others the last room - 1.
    """
    if not ids or (len(ids) > room and truncation == "error"):
        remedy = f"raise {setting}, set truncation, or edit it" if ids else "edit it"
        raise RecordError(f"the {what} in row {row} has {len(ids)} tokens, outside 1..{room}: {remedy}")
    if len(ids) <= room or truncation == "keep_start":
        return ids[:room], room < len(ids)
    front = ids[: int(ids[0] == start)]
    return front + ids[len(ids) - (room - len(front)) :], True


def _open_text(tokenizer: Any, text: str, plain: list[int], row: int) -> Tokenizing[list[int]]:
    if not tokenizer.num_special_tokens_to_add():
        return plain
    ids = yield text, True
    places = [place for place in range(len(ids) - len(plain) + 1) if ids[place : place + len(plain)] == plain]
    if not places:
        raise RecordError(
            f"the prompt in row {row} has other tokens when the tokenizer adds its special tokens: give it as messages"
        )
    # There are several only where all of the text is the same token: of starts it is the last, of ends the first.
    place = places[-1] if plain[:1] == [tokenizer.bos_token_id] else places[0]
    before, after = ids[:place], ids[place + len(plain) :]
    if before[-1:] == plain[:1] == [tokenizer.bos_token_id]:
        before = before[:-1]
    if after[-1:] == [tokenizer.eos_token_id]:
        after = after[:-1]
    return before + plain + after


class _Turn(NamedTuple):
    """A turn that was sampled, in the text of its conversation: the prompt before it, and what follows its tokens.

    end: the token that ends it where `behind` follows a special token.
    """

    before: str
    behind: str
    end: int | None


def _turns_with_own_ids(tokenizer: Any, asked: Conversation, text: str) -> Tokenizing[tuple[list[int], bool]]:
    """Ids of a conversation's text, and whether a turn that a model sampled has others than it made.

    Such a turn keeps its ids, with its own end, behind the very ids that it was sampled for, so that a conversation
    goes on from what the model has seen. It does where the template writes all up to it, and its content, as it did
    then; what a template rewrites is tokenized like any text, with all that stands before it.
    """
    sampled = {
        place: turn["content"]
        for place, turn in enumerate(asked.messages)
        if turn["role"] == "assistant" and isinstance(turn.get("content"), SampledText)
    }
    own = {place: ids for place, said in sampled.items() if (ids := own_tokens(tokenizer, said))}
    parts: list[list[int]] = []
    for place in sorted(own, reverse=True):
        turn = _unchanged(tokenizer, asked, place, text)
        if turn is None:
            break
        text, behind = turn.before, (yield from _behind_ids(tokenizer, turn))
        parts += [behind, own[place]]
    parts.append((yield text, False))
    # Two parts of each turn that keeps its ids, and the text before all of them.
    return [token for part in reversed(parts) for token in part], len(parts) < 2 * len(sampled) + 1


def _unchanged(tokenizer: Any, asked: Conversation, place: int, text: str) -> _Turn | None:
    """The sampled turn at a place where the text holds it as it was made, else None."""
    said: SampledText = asked.messages[place]["content"]
    # A first message is nothing that a model was asked for.
    before = rendered_start(tokenizer, asked, place) if place else None
    if before is None or not text.startswith(before + said):
        return None
    behind, closed, last = text[len(before) + len(said) :], closing(tokenizer), said.tokens[-1]
    ends = () if closed is None else closed.ends
    if said.end == "cut" or last not in (*facts_of(tokenizer).special, *ends):
        # It has no end, or one that stands within the turn, as a word does.
        return _Turn(before, behind, None)
    for end in (last, *ends):
        token = tokenizer.convert_ids_to_tokens(end)
        if behind.lstrip().startswith(token):
            return _Turn(before, behind.lstrip().removeprefix(token), last)
    # Where the template ends turns, but not this one there, it wrote more into the turn.
    return None if ends else _Turn(before, behind, last)


def _behind_ids(tokenizer: Any, turn: _Turn) -> Tokenizing[list[int]]:
    """Ids of what follows a turn: no token spans a special one, or the end of what was cut."""
    if turn.end is not None:
        whole = yield tokenizer.convert_ids_to_tokens(turn.end) + turn.behind, False
        if whole[:1] == [turn.end]:
            return whole[1:]
    return (yield from _apart(turn.behind))


def _completion_text(tokenizer: Any, prompt: Prompt, value: Any, row: int) -> tuple[str, bool]:
    """The text behind the prompt's, and whether the chat template wrote it."""
    if isinstance(value, str):
        if prompt.asked is None:
            return value, False
        turn = {"role": "assistant", "content": str(value)}
        try:
            return turn_text(tokenizer, prompt.text, prompt.asked, turn, row), True
        except RecordError:
            # A template that refuses turns, or rewrites prompts, says nothing of how a text goes on from a prompt.
            return value, False
    if not is_messages(value):
        raise RecordError(f"the completion in row {row} must be a string or a message, not {kind(value)}")
    turns = read_messages(value, f"the completion in row {row}")
    if len(turns) != 1:
        raise RecordError(
            f"the completion in row {row} has {len(turns)} messages, but a model makes one: put the earlier ones into "
            "the prompt"
        )
    if prompt.asked is None:
        raise RecordError(
            f"the completion in row {row} is a message but its prompt is {kind(prompt.text)}: give both as messages, "
            "or the completion as a string"
        )
    return turn_text(tokenizer, prompt.text, prompt.asked, turns[0], row), True


def following(tokenizer: Any, prompt: Prompt, text: str) -> Tokenizing[tuple[list[int], bool]]:
    """Token ids of a text as what follows the prompt's, and whether tokens of both merge where they are one text.

    Where they do, the text is tokenized apart: the prompt stays what the model is asked.
    """
    # A tokenizer that splits at spaces makes one word of two without a space between them, which may be no token.
    together = facts_of(tokenizer).marks_spaces or prompt.text[-1:].isspace() or not text or text[0].isspace()
    if together:
        whole = yield prompt.text + text, False
        ids = whole[len(prompt.plain) :]
        if whole[: len(prompt.plain)] == prompt.plain and (ids or not text.strip()):
            return ids, False
    return (yield from _apart(text)), True


def _apart(text: str) -> Tokenizing[list[int]]:
    """Token ids of a text that is not the first of its row, and of which no token reaches into what stands before."""
    for before in BEFORE:
        start, whole = (yield before, False), (yield before + text, False)
        if whole[: len(start)] == start and (len(whole) > len(start) or not text.strip()):
            return whole[len(start) :]
    return (yield text, False)


def _up_to_the_end(
    ids: list[int], text: str, closed: Closing | None, end: int | None, ends: Sequence[int]
) -> list[int]:
    """The ids of a turn without those behind its end: templates write line breaks there, which no model makes."""
    if closed is not None and text.endswith(closed.text):
        behind = 0 if end is None else len(closed.tokens) - closed.tokens.index(end) - 1
        kept = ids[: len(ids) - behind]
        if end is None or kept[-1:] == [end]:
            return kept
    last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids) - 1)
    return ids[: last + 1]


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
    texts = _probed(tokenizer, asked, turn["role"], row)
    opening = _common_start(*texts)
    # Of templates that write a content twice, or nothing of it, this is no opening.
    once = len({text.removeprefix(opening + probe) for text, probe in zip(texts, PROBES, strict=True)}) == 1
    given = _common_start(prompt, render(tokenizer, asked, row, False))
    if not once or len(opening) < len(given) or not (prompt.startswith(opening) and whole.startswith(opening)):
        raise RecordError(
            f"the chat template does not leave the prompt in row {row} as it is when the completion follows (it "
            "rewrites earlier turns): give that completion as a string"
        )
    begun = prompt[len(opening) :]
    # A block that begins with <name> there and has no end.
    if any(begun.rfind(f"<{name}>") > begun.rfind(f"</{name}>") for name in re.findall(r"<(\w+)>", begun)):
        raise RecordError(
            f"the chat template ends the prompt in row {row} with {begun!r}, for the model to go on "
            "from, which a message does not: give that completion as a string that goes on from there"
        )
    return whole[len(opening) :]


def _probed(tokenizer: Any, asked: Conversation, role: str, row: int) -> list[str]:
    """What is asked and a turn of each of the `PROBES`, as the template writes them."""
    turns = ({"role": role, "content": probe} for probe in PROBES)
    return [render(tokenizer, asked.followed_by(turn), row, False) for turn in turns]


def _common_start(one: str, other: str) -> str:
    places = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(places, min(len(one), len(other)))]


def _read(tokenizer: Any) -> Closing | None:
    try:
        texts = _probed(tokenizer, Conversation(({"role": "user", "content": "a"},)), "assistant", 0)
    except RecordError:
        return None
    tail = _common_start(*(text[::-1] for text in texts))[::-1]
    if not all(text.removesuffix(tail).endswith(probe) for text, probe in zip(texts, PROBES, strict=True)):
        return None
    tokens = tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])
    facts = facts_of(tokenizer)
    ends = [token for token in tokens if token in facts.special] or [token for token in tokens if token in facts.added]
    return Closing(tail, tokens, tuple(ends[:1]))
