"""Values of tools in preferences: filled in once, when a file is read, and kept with the records."""

from collections.abc import Sequence
from typing import Any

from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.records import SIDES, PreferenceRecord
from sysdpo_jax.graph import CompoundSystem, Known
from sysdpo_jax.typing import Record
from sysdpo_jax.values import SampledText


def with_tools(system: CompoundSystem, rows: Sequence[Record], known: Known) -> list[Any]:
    """The runs with the values that they lack of tools that a model reads or, where one failed, the `ToolError`.

    Of runs without intermediate values the tools that read inputs alone. known: see `CompoundSystem.complete`.
    """
    inner = [node.name for node in system.intermediates]
    every = [node.name for node in system.nodes if not node.deterministic]
    given = {node.name for node in system.given}
    read = [node.name for node in system.with_ancestors(every) if node.name in given]
    made: list[Any] = list(rows)
    whole = [all(name in row for name in inner) for row in rows]
    for kind, names in ((True, every), (False, read)):
        places = [place for place, is_whole in enumerate(whole) if is_whole == kind]
        for place, row in zip(places, system.complete([rows[p] for p in places], names, known), strict=True):
            made[place] = row
    return made


def stored_with_tools(system: CompoundSystem, record: PreferenceRecord, known: Known) -> PreferenceRecord:
    """The record with what tools gave, as `with_tools` has filled `known`, and files can hold as it is."""
    sides = [getattr(record, side) for side in SIDES]
    rows = with_tools(system, [{**record.inputs, **side} for side in sides], known)
    tools = [node.name for node in system.nodes if node.deterministic]
    filled = (
        {**side, **{name: row[name] for name in tools if name in row and name not in side and is_plain(row[name])}}
        for side, row in zip(sides, rows, strict=True)
        if not isinstance(row, ToolError)
    )
    return PreferenceRecord(record.inputs, *filled)


def is_plain(value: Any) -> bool:
    """Whether JSON, with bytes, gives the very same value back: a tuple or an array would come back as a list."""
    if type(value) is dict:
        return all(type(name) is str for name in value) and all(map(is_plain, value.values()))
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (str, SampledText, int, float, bool, bytes)
