"""Prompts and completions as token ids: what a tokenizer adds by itself, chat templates, and texts that are too long.

All functions run on the host and raise `RecordError` that names the row. Those that need token ids are generators: they
yield the texts to tokenize, and `tokenized` runs the rows of a batch side by side, so that the tokenizer is called with
many texts at a time.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.user_code import user_code

# What becomes of a text without room: refused, or a prompt keeps its first or its last tokens.
Truncation = Literal["error", "keep_start", "keep_end"]
TRUNCATIONS = get_args(Truncation)

T = TypeVar("T")
# A text, and whether the tokenizer adds its special tokens to it.
Question = tuple[str, bool]
# What yields questions, is sent the token ids of each, which it must not change, and returns a T.
Asking = Generator[Question, list[int], T]


def tokenized(tokenizer: Any, rows: Iterable[Asking[T]]) -> list[T]:
    """What each row returns. The rows' questions are answered together, a round at a time, equal ones once.

    Raises what the first of the failing rows raises.
    """
    running = dict(enumerate(rows))
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}
    known: dict[Question, list[int]] = {}
    asked: dict[int, Question] = {}
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


def prompt_ids(tokenizer: Any, prompt: Any, row: int) -> Asking[list[int]]:
    """Token ids of a string as the tokenizer makes them by default, or of messages that await the next turn.

    Of a string's ids, a start that the text holds already is not put before it again, and an end that the tokenizer
    puts after every text is left out, because the text goes on.
    """
    if isinstance(prompt, str):
        return (yield from _open_text(tokenizer, prompt, row))
    if not _is_chat(prompt):
        raise RecordError(f"the prompt in row {row} must be a string or messages, not {_kind(prompt)}")
    return (yield _chat_text(tokenizer, prompt, row, True), False)


def completion_ids(
    tokenizer: Any, prompt: Any, prompt_tokens: Sequence[int], value: Any, ends: Sequence[int], room: int, row: int
) -> Asking[list[int]]:
    """Token ids of a string without special tokens, or of the one message that follows the prompt's messages; one end.

    prompt_tokens: `prompt_ids` of the prompt, before any cut. A string is tokenized apart from its prompt, so that no
    token spans their boundary. Of a message's ids, those after its last token in `ends` are left out: templates write
    line breaks there, which a model that stops at the end never makes.
    """
    ids = yield from _open_completion(tokenizer, prompt, prompt_tokens, value, ends, row)
    # One that fills its room has no end, as sampling stops there too: its probability is that of being cut.
    if len(ids) == room or (ids and ids[-1] in ends):
        return ids
    return [*ids, (yield from _turn_end(tokenizer, prompt, prompt_tokens, value, ends, row))]


def check_vocabulary(tokenizer: Any, ids: Sequence[int], vocab_size: int, what: str, row: int) -> None:
    """Raise `RecordError` for an id that the decoder has no embedding for; it would be read as another token."""
    token = next((token for token in ids if token >= vocab_size), None)
    if token is not None:
        raise RecordError(
            f"the {what} in row {row} holds the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), but the "
            f"decoder knows ids below {vocab_size}: leave it out, or give the tokenizer that belongs to the decoder"
        )


def fitting_texts(tokenizer: Any, rows: Sequence[Sequence[int]], room: int) -> list[str]:
    """The texts of rows of ids, those shortened that would have more than `room` tokens, see `fitting_text`."""
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        text if len(back) <= room else fitting_text(tokenizer, ids, room)
        for text, back, ids in zip(texts, again, rows, strict=True)
    ]


def fitting_text(tokenizer: Any, ids: Sequence[int], room: int) -> str:
    """The text of ids, shortened until it has no more than `room` tokens when it is tokenized again."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    for kept in range(len(ids) - 1, -1, -1):
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= room:
            break
        # What is left of a character at the end reads as U+FFFD.
        text = str(tokenizer.decode(ids[:kept], skip_special_tokens=True)).rstrip("\ufffd")
    return text


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


def _open_text(tokenizer: Any, text: str, row: int) -> Asking[list[int]]:
    plain = yield text, False
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


def _open_completion(
    tokenizer: Any, prompt: Any, prompt_tokens: Sequence[int], value: Any, ends: Sequence[int], row: int
) -> Asking[list[int]]:
    if isinstance(value, str):
        return (yield value, False)
    if not _is_chat(value):
        raise RecordError(f"the completion in row {row} must be a string or a message, not {_kind(value)}")
    if len(value) != 1:
        raise RecordError(
            f"the completion in row {row} has {len(value)} messages, but a model makes one: put the earlier ones into "
            "the prompt"
        )
    if not _is_chat(prompt):
        raise RecordError(
            f"the completion in row {row} is a message but its prompt is {_kind(prompt)}: give both as messages, or "
            "the completion as a string"
        )
    whole = yield _chat_text(tokenizer, [*prompt, *value], row, False), False
    if whole[: len(prompt_tokens)] != list(prompt_tokens):
        raise RecordError(
            f"the chat template does not leave the prompt in row {row} as it is when the completion follows (it "
            "rewrites earlier turns, or a token spans the boundary): give that completion as a string"
        )
    ids = whole[len(prompt_tokens) :]
    last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids) - 1)
    return ids[: last + 1]


def _turn_end(
    tokenizer: Any, prompt: Any, prompt_tokens: Sequence[int], value: Any, ends: Sequence[int], row: int
) -> Asking[int]:
    """The token that closes a completion without an end.

    For a string after messages it is the last of `ends` that the chat template writes behind it as an assistant's
    turn; else, and where the template writes none, rewrites the prompt or refuses the turn, it is ends[0].
    """
    if isinstance(prompt, str) or not isinstance(value, str) or len(set(ends)) == 1:
        return ends[0]
    try:
        text = _chat_text(tokenizer, [*prompt, {"role": "assistant", "content": value}], row, False)
    except RecordError:
        return ends[0]
    whole = yield text, False
    if whole[: len(prompt_tokens)] != list(prompt_tokens):
        return ends[0]
    written = [token for token in whole[len(prompt_tokens) :] if token in ends]
    # The text may hold ends itself.
    own = sum(token in ends for token in (yield value, False))
    return written[-1] if len(written) > own else ends[0]


def _chat_text(tokenizer: Any, messages: Sequence[Any], row: int, awaits_turn: bool) -> str:
    """The messages as their template writes them, with all special tokens."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise RecordError(
            f"row {row} holds messages but the tokenizer has no chat template: set tokenizer.chat_template, or give a "
            "string"
        )
    try:
        with user_code(f"the chat template for the messages in row {row}", RecordError, (TemplateError,)):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=awaits_turn))
    except TemplateError as error:
        raise RecordError(f"the chat template refuses the messages in row {row}: {error}") from error


def _is_chat(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _kind(value: Any) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        inner = {type(item).__name__ for item in value}
        return f"a list of {' and '.join(sorted(inner)) or 'nothing'} (a message has a 'role' and a 'content')"
    return type(value).__name__
