"""Plates: the values of a node's copies, as a list for each run."""

from collections.abc import Sequence
from typing import Any

from sysdpo_jax.components.tool import Tool, ToolError
from sysdpo_jax.user_code import name_of


def instead_of_plate(value: Any, plate: int) -> str | None:
    """What a value is instead of a plate's list, None where it is one."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return type(value).__name__
    return None if len(value) == plate else f"{len(value)} values"


def as_plate(value: Any, tool: Tool, plate: int) -> Any:
    """A plate's list of what a tool gave, or the `ToolError`."""
    instead = None if isinstance(value, ToolError) else instead_of_plate(value, plate)
    if instead is not None:
        reason = f"the tool {name_of(tool.function)} gave {instead} for a plate of {plate}: return a list of {plate}"
        return ToolError(reason, tool.on_error == "skip", refused=True)
    return value if isinstance(value, ToolError) else list(value)


def grouped(values: Sequence[Any], plate: int) -> list[list[Any]]:
    """The copies' values, a list for each row."""
    return [list(values[start : start + plate]) for start in range(0, len(values), plate)]


def by_rank(sizes: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """The first `number` of all tuples with 0 <= t[i] < sizes[i], by their sum."""
    found: list[tuple[int, ...]] = []
    level = {(0,) * len(sizes)}
    while level and len(found) < number:
        found += sorted(level)
        longer = ((*t[:i], t[i] + 1, *t[i + 1 :]) for t in level for i in range(len(sizes)))
        level = {t for t in longer if all(rank < size for rank, size in zip(t, sizes, strict=True))}
    return found[:number]
