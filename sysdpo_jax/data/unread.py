"""Fields of a row that nothing reads: they are refused by name, because they may say what changes the result."""

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from sysdpo_jax.components.base import RecordError

# Where a row comes from; the last one is what pandas leaves in tables.
ORIGIN = ("id", "prompt_id", "source", "dataset", "__index_level_0__")
# What other trainers take from fields of these names, and what to do with it here.
REMEDIES = {
    "system": "make it the first message of the prompt",
    "tools": "put it beside the messages of an input, {'messages': [...], 'tools': [...]}",
    "chat_template_kwargs": "put it beside the messages of an input, {'messages': [...], 'chat_template_kwargs': ...}",
    "images": "records that name the images of a node are for the reader 'records'",
    "weight": "every preference counts the same, so leave rows out or repeat them",
    "margin": "no loss reads the margin of a row",
}


def refuse_unread(
    row: Mapping[str, Any],
    read: Collection[str],
    known: Collection[str] = (),
    remedy: str = "name it in `ignore` (data.ignore of a run, --ignore of rollout)",
) -> None:
    """Raise `RecordError` naming a field that is not read and may change the result.

    Those of `ORIGIN` and `known`, empty ones, and those that repeat a text or list that is read, change nothing.
    remedy: what to do with a field that says nothing of the result either.
    """
    for name, value in row.items():
        if name in read or name in ORIGIN or name in known or is_empty(value):
            continue
        if isinstance(value, str | list) and any(value == row.get(other) for other in read):
            continue
        near = [other for other in get_close_matches(name, read, 1, 0.8) if is_empty(row.get(other))]
        hint = f"did you mean {near[0]!r}?" if near else REMEDIES.get(name, "give it a name that is read")
        raise RecordError(f"the field {name!r} is not read: {hint}; where it does not matter, {remedy}")


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, a blank text, NaN as pandas writes it, or a container of such values."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return isinstance(value, list | tuple) and all(map(is_empty, value))
