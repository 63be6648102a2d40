"""Preferences on whole runs of a system."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.graph import CompoundSystem, Known

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferenceRecord:
    """Two runs of the system on the same inputs: `{node: value}` of the preferred one and of the other.

    Both hold every intermediate value (for `DirectObjective`) or none (for `SamplingObjective`), and every final value.
    """

    inputs: Mapping[str, Any]
    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]


def check_intermediates(system: CompoundSystem, record: PreferenceRecord, held: bool | None = None) -> bool:
    """Whether the record holds the system's intermediate values; True for a system that has none.

    held: whether those before it do. Raises `RecordError` naming a side that holds some of them and not others, or does
    otherwise than what stands before it.
    """
    names = [node.name for node in system.intermediates]
    for side in SIDES:
        present = [name for name in names if name in getattr(record, side)]
        if present and len(present) < len(names):
            absent = ", ".join(name for name in names if name not in present)
            raise RecordError(
                f"{side} holds {', '.join(present)} but not {absent}: give all intermediate values or none"
            )
        whole = len(present) == len(names)
        if held is not None and whole != held:
            raise RecordError(
                f"{side} {'lacks' if held else 'has'} the intermediate values {', '.join(names)}, unlike what stands "
                "before: give them everywhere or nowhere"
            )
        held = whole
    return bool(held)


def hold_intermediates(system: CompoundSystem, records: Sequence[PreferenceRecord]) -> bool:
    """`check_intermediates` of all records, True for none. Raises `RecordError` naming the row too."""
    held: bool | None = None
    for row, record in enumerate(records):
        try:
            held = check_intermediates(system, record, held)
        except RecordError as error:
            raise RecordError(f"record {row}: {error}") from None
    return held is None or held


def require_inputs(system: CompoundSystem, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RecordError` naming the row that lacks an input, and the input."""
    for row, values in enumerate(rows):
        missing = [name for name in system.inputs if name not in values]
        if missing:
            raise RecordError(f"record {row} lacks a value for the input {', '.join(missing)}: add the field")


def without_intermediates(system: CompoundSystem, records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """The same preferences on the final values alone, as `SamplingObjective` takes them.

    Recorded values of tools that read inputs alone stay: the intermediates may depend on them.
    Raises `RecordError` naming the row and the final value that it lacks.
    """
    names, given = [node.name for node in system.outputs], [node.name for node in system.given]

    def final(row: int, side: str, values: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in names if name not in values]
        if missing:
            raise RecordError(f"record {row}: {side} lacks a value for {', '.join(missing)}: add the field")
        return {name: values[name] for name in (*given, *names) if name in values}

    return [
        PreferenceRecord(r.inputs, final(row, "chosen", r.chosen), final(row, "rejected", r.rejected))
        for row, r in enumerate(records)
    ]


def prepare_pairs(system: CompoundSystem, records: Sequence[PreferenceRecord], known: Known | None = None) -> PairBatch:
    """Both sides as feature trees with a leading axis of `len(records)`.

    known: see `CompoundSystem.complete`; what a tool gives of the inputs alone is asked for once for both sides.
    Raises `RecordError` as `prepare` does, and for records without intermediates.
    """
    if records and not hold_intermediates(system, records):
        missing = ", ".join(node.name for node in system.intermediates)
        raise RecordError(
            f"the records hold no intermediate values ({missing}): record them, or train with SamplingObjective on "
            "SearchedBatches, which searches for them"
        )
    sides = [[{**r.inputs, **side} for r, side in zip(records, column, strict=True)] for column in (
        [r.chosen for r in records], [r.rejected for r in records])]  # fmt: skip
    prepared, known = [], {} if known is None else known
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        try:
            prepared.append(system.prepare(side, known=known))
        except RecordError as error:
            raise RecordError(f"{name} runs: {error}") from error
    return PairBatch(*prepared)
