"""Preferences on whole runs of a system, and the JSON Lines file that holds them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.objectives.log_ratio import PairBatch


@dataclass(frozen=True)
class PreferenceRecord:
    """Two runs of the system on the same inputs: `{node: value}` of the preferred one and of the other."""

    inputs: Mapping[str, Any]
    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]


def load_preferences(path: str | Path) -> list[PreferenceRecord]:
    """Read JSON Lines: one object a line with the objects "inputs", "chosen" and "rejected".

    Raises `RecordError` naming file, line and field for text that is no such object; `FileNotFoundError` for no file.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"{where}: not valid JSON ({error}); write one object a line") from error
        for name in ("inputs", "chosen", "rejected"):
            if not isinstance(row, dict) or not isinstance(row.get(name), dict):
                raise RecordError(f"{where}: the field {name!r} must be an object of named values")
        records.append(PreferenceRecord(row["inputs"], row["chosen"], row["rejected"]))
    if not records:
        raise RecordError(f"{path} holds no record")
    return records


def prepare_pairs(system: CompoundSystem, records: Sequence[PreferenceRecord]) -> PairBatch:
    """Both sides as feature trees with a leading axis of `len(records)`. Raises `RecordError` as `prepare` does."""
    sides = [[{**r.inputs, **side} for r, side in zip(records, column, strict=True)] for column in (
        [r.chosen for r in records], [r.rejected for r in records])]  # fmt: skip
    prepared = []
    for name, side in zip(PairBatch._fields, sides, strict=True):
        try:
            prepared.append(system.prepare(side))
        except RecordError as error:
            raise RecordError(f"{name} runs: {error}") from error
    return PairBatch(*prepared)
