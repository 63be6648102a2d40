"""Raw values of records: which are the same."""

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
    """Equal for equal values and, as text, the same in every process."""
    if isinstance(value, Mapping):
        return tuple((name, content(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(content(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | bytes | PurePath):
        return value
    array = np.asarray(value)
    return array.shape, array.dtype.str, array.tobytes()
