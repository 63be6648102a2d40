"""Raw values of records: which are the same."""

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np


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
    if value is None or isinstance(value, str | int | float | bytes | PurePath):
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
    return value is None or type(value) in (str, int, float, bool, bytes)
