"""Raw values of records: texts that remember how they were made, their form in JSON, and which values are the same."""

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import PurePath
from typing import Any, Literal, get_args

import numpy as np

# How a sampled text ended: at the tokenizer's end of sequence, at another token that stops, or for want of room.
End = Literal["end", "stop", "cut"]
# The names of a sampled text in JSON, all of them and no other.
TEXT, TOKENS, END, TOKENIZER = FIELDS = ("text", "tokens", "end", "tokenizer")


class SampledText(str):
    """A text that a language model made, which carries the tokens that it is made of.

    It equals and hashes like its text: two samples that read the same are one value to whatever reads them, whatever
    their tokens. What str's methods make of it, such as `upper()`, is a plain text.

    Attributes:
        tokens: The ids that the model made, with the one that ended the text where there is one; none where nobody
            told them, of a text of which it is known that it was cut.
        end: How the text ended.
        tokenizer: The fingerprint of the tokenizer whose ids they are, see `components.sampled_text`.
    """

    tokens: tuple[int, ...]
    end: End
    tokenizer: str

    def __new__(cls, text: str, tokens: Iterable[int], end: End, tokenizer: str) -> "SampledText":
        made = super().__new__(cls, text)
        made.tokens, made.end, made.tokenizer = tuple(map(int, tokens)), end, tokenizer
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What copies are made of."""
        return str(self), self.tokens, self.end, self.tokenizer


def to_json(value: Any) -> Any:
    """The value with an object {"text", "tokens", "end", "tokenizer"} in the place of each sampled text.

    Everything else stays as it is, in new lists and dicts.
    """
    if isinstance(value, SampledText):
        return dict(zip(FIELDS, (str(value), list(value.tokens), value.end, value.tokenizer), strict=True))
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given. Such an object without tokens is a plain text, as tables write it beside others, unless
    it was cut."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if TOKENS not in value or sampled_fault(value) is not None:
        return {name: from_json(item) for name, item in value.items()}
    return SampledText(*(value[name] for name in FIELDS)) if value[TOKENS] or value[END] == "cut" else value[TEXT]


def sampled_fault(value: Mapping[str, Any]) -> str | None:
    """What keeps an object from being a sampled text, None for one that is: for errors."""
    if set(value) != set(FIELDS):
        return f"a sampled text has the fields {', '.join(FIELDS)} and no other, this one {', '.join(map(str, value))}"
    if not isinstance(value[TEXT], str) or not isinstance(value[TOKENIZER], str):
        return f"the {TEXT} and the {TOKENIZER} of a sampled text are texts"
    tokens = value[TOKENS]
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        return f"the {TOKENS} of a sampled text are a list of whole numbers from 0 on"
    if value[END] not in get_args(End):
        return f"the {END} of a sampled text is one of {', '.join(get_args(End))}"
    return None


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repeats, in their order: numbers, texts, images, arrays, and lists or mappings of these."""
    kept: dict[Hashable, Any] = {}
    for value in values:
        kept.setdefault(content(value), value)
    return list(kept.values())


def content(value: Any) -> Hashable:
    """Equal for equal values alone and, as text, the same in every process: True is no 1, and {} no [].

    Raises `TypeError` for an object that neither NumPy knows nor can be hashed.
    """
    if isinstance(value, Mapping):
        return "mapping", tuple((name, content(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return "list", tuple(content(item) for item in value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        # A sampled text is its text here: what reads it cannot tell it from another one with the same letters.
        return "str", str(value)
    if value is None or isinstance(value, int | float | bytes | PurePath):
        return type(value).__name__, value
    array = np.asarray(value)
    if array.dtype.hasobject:
        # The array would hold its address, at which another object may lie later.
        hash(value)
        return type(value).__qualname__, value
    # A digest: keys of pictures are kept as long as what they stand for.
    return array.shape, array.dtype.str, hashlib.sha256(array.tobytes()).digest()


class Unequal:
    """In the place of values of which nobody can tell whether they equal others: equal to itself alone."""


def content_or_unequal(value: Any) -> Hashable:
    """`content`, and an `Unequal` of its own for a value that has none."""
    try:
        return content(value)
    except TypeError:
        return Unequal()


def is_plain(value: Any) -> bool:
    """Whether JSON, with bytes, gives the very same value back: a tuple or an array would come back as a list."""
    if type(value) is dict:
        return all(type(name) is str for name in value) and all(map(is_plain, value.values()))
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (str, SampledText, int, float, bool, bytes)
