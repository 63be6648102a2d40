"""Preferences on whole runs of a system: what a record holds, whether it fits a system, and its features."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sysdpo_jax.batch import PairBatch, share
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.errors import meant
from sysdpo_jax.graph import CompoundSystem, GraphError, Known
from sysdpo_jax.structure import instead_of_plate
from sysdpo_jax.typing import Features, Record

SIDES = ("chosen", "rejected")
# Errors that are kept to be shown, and reasons that are told apart.
KEPT_ERRORS, KEPT_REASONS = 5, 20


@dataclass(frozen=True)
class PreferenceRecord:
    """Two runs of the system on the same inputs.

    Both hold every intermediate value (for `DirectObjective`) or none (for `SamplingObjective`), and every final value.

    Args:
        inputs: `{input: value}`.
        chosen: `{node: value}` of the preferred run.
        rejected: The same of the other.
    """

    inputs: Mapping[str, Any]
    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]

    def runs(self) -> list[dict[str, Any]]:
        """Both as records of the system.

        Returns:
            The chosen run and the rejected one, inputs included.
        """
        return [{**self.inputs, **self.chosen}, {**self.inputs, **self.rejected}]


@dataclass
class Counts:
    """read: rows; kept: records; ties: rows without a preference; skipped: what had errors, of which some are kept.

    reasons: how many were skipped for what. sha256: of the file, or of what is known of a data set of many files.
    """

    read: int = 0
    kept: int = 0
    ties: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    sha256: str = ""

    def skip(self, message: str, error: RecordError) -> None:
        """Count a row that is left out."""
        self.skipped += 1
        if len(self.errors) < KEPT_ERRORS:
            self.errors.append(message)
        # The numbers and long texts of a message are those of its row; a single word may name a node or a field.
        short = re.sub(
            r"'[^']*'|\"[^\"]*\"", lambda quoted: quoted[0] if quoted[0][1:-1].isidentifier() else "'...'", str(error)
        )
        reason = re.sub(r"\d+", "#", short)
        reason = reason if reason in self.reasons or len(self.reasons) < KEPT_REASONS else "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def summary(self, source: str) -> str:
        """The counts in a line, with the first of the errors, and how many were left out for what."""
        ties = f", {self.ties} without a preference" if self.ties else ""
        skipped = f", {self.skipped} skipped (the first: {self.errors[0]})" if self.skipped else ""
        if len(self.reasons) > 1:
            skipped += "".join(f"\n  {number} x {reason}" for reason, number in self.reasons.items())
        return f"{source}: {self.read} rows, {self.kept} preferences{ties}{skipped}"

    def add(self, other: "Counts") -> None:
        """Count what another part counted."""
        for name in ("read", "kept", "ties", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors = (self.errors + other.errors)[:KEPT_ERRORS]
        self.reasons = dict(Counter(self.reasons) + Counter(other.reasons))


def check_names(system: CompoundSystem, record: PreferenceRecord) -> None:
    """Raise `RecordError` naming side and field where a record's names and lists are not those of the system.

    Inputs and final values must be there, and inputs say something: a system may answer with nothing, but nobody asks
    it nothing.
    """
    nodes = {node.name: node for node in system.recorded}
    # Whether the others are there depends on values that tools may still have to give.
    final = [node.name for node in system.outputs if not system.is_routed(node)]
    for where, known, needed in (("inputs", system.inputs, system.inputs), *((side, nodes, final) for side in SIDES)):
        values = getattr(record, where)
        for name in values:
            if name not in known:
                raise RecordError(f"{where}, field {name!r} is no name of the system: {meant(name, known)}")
        for name in needed:
            if name not in values:
                raise RecordError(f"{where} lacks the field {name!r}: add it")
    for name, value in record.inputs.items():
        if isinstance(value, str) and not value.strip():
            raise RecordError(f"inputs, field {name!r} is empty: write a text, or drop the row")
    for side in SIDES:
        for name, value in getattr(record, side).items():
            plate = nodes[name].plate
            if plate is None or nodes[name].deterministic or value is None:
                continue
            # An array may be one picture.
            has = instead_of_plate(value, plate) if isinstance(value, list | tuple) else type(value).__name__
            if has is not None:
                raise RecordError(f"{side}, field {name!r}: {has} instead of a list of {plate}, one for each copy")


def check_intermediates(
    system: CompoundSystem, record: PreferenceRecord, held: bool | None = None, known: Known | None = None
) -> bool | None:
    """Whether the record holds the system's intermediate values; True for a system that has none.

    None where no intermediate runs in the record, and `held` is not given. held: whether those before it do. known: see
    `CompoundSystem.complete`. Raises `RecordError` naming a side that holds some of them and not others, or does
    otherwise than what stands before it; and `ToolError` for a side in which nobody can tell which of them run.
    """
    if not system.intermediates:
        return True
    for side in SIDES:
        values = getattr(record, side)
        try:
            names = _told_apart_by(system, {**record.inputs, **values}, known)
        except ToolError as error:
            raise error.at(side) from error.__cause__
        if not names:
            continue
        # Tables have a null for what a row lacks.
        present = [n for n in names if n in values and not (values[n] is None and system.is_routed(system.node(n)))]
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
    return held


def _told_apart_by(system: CompoundSystem, run: Record, known: Known | None) -> list[str]:
    """The intermediates that tell a run with intermediate values from one without: those that surely run in it.

    Where all stand behind switches these are asked, as far as inputs and tools that read nothing else decide.
    """
    names = [node.name for node in system.intermediates if not system.is_routed(node)]
    if names or not all(name in run for name in system.inputs):
        return names
    read = {name for node in system.intermediates for name in system.flow.depends[node.name]}
    tools = [node.name for node in system.given if node.name in read]
    [made] = system.complete([run], tools, known)
    if isinstance(made, ToolError):
        raise made
    for node in system.intermediates:
        # What only an intermediate decides is left to `CompoundSystem.complete`.
        with suppress(KeyError):
            names += [node.name] if system.flow.runs(node.name, made) else []
    return names


def hold_intermediates(system: CompoundSystem, records: Sequence[PreferenceRecord], known: Known | None = None) -> bool:
    """`check_intermediates` of all records, True for none. Raises `RecordError` naming the row too."""
    held: bool | None = None
    known = {} if known is None else known
    for row, record in enumerate(records):
        try:
            held = check_intermediates(system, record, held, known)
        except RecordError as error:
            raise RecordError(f"record {row}: {error}") from None
    return held is None or held


def require_intermediates(system: CompoundSystem, held: bool) -> None:
    """Raise `RecordError` for records that hold no intermediate values, where an objective reads them."""
    if not held:
        missing = ", ".join(node.name for node in system.intermediates)
        raise RecordError(
            f"the records hold no intermediate values ({missing}): record them, or train with SamplingObjective on "
            "SearchedBatches, which searches for them"
        )


def require_searchable(system: CompoundSystem) -> None:
    """Raise `GraphError` for a system with a loop or a remote model, whose values nobody can search for and weigh."""
    for node in system.nodes:
        if not (node.has_params or node.deterministic):
            raise GraphError(
                f"node {node.name!r} is a remote model, whose values have no known probability to weigh intermediates "
                "by: record whole runs, with their intermediate values, and train with DirectObjective"
            )
    for name in system.bodies:
        raise GraphError(
            f"node {name!r} is a loop, whose turns are not searched for: record whole runs, with their intermediate "
            "values, and train with DirectObjective"
        )


def require_inputs(system: CompoundSystem, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RecordError` naming the row that lacks an input, and the input."""
    for row, values in enumerate(rows):
        missing = [name for name in system.inputs if name not in values]
        if missing:
            raise RecordError(f"record {row} lacks a value for the input {', '.join(missing)}: add the field")


def without_intermediates(system: CompoundSystem, records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """The same preferences on the final values alone, as `SamplingObjective` takes them.

    Args:
        system: Which values are final.
        records: With intermediates or without.

    Returns:
        The records without. Recorded values of tools that read inputs alone stay: the intermediates may depend on them.

    Raises:
        RecordError: Naming the row and the final value that it lacks.
    """
    names, given = [node.name for node in system.outputs], [node.name for node in system.given]
    always = [node.name for node in system.outputs if not system.is_routed(node)]

    def final(row: int, side: str, values: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in always if name not in values]
        if missing:
            raise RecordError(f"record {row}: {side} lacks a value for {', '.join(missing)}: add the field")
        return {name: values[name] for name in (*given, *names) if values.get(name) is not None}

    return [
        PreferenceRecord(r.inputs, final(row, "chosen", r.chosen), final(row, "rejected", r.rejected))
        for row, r in enumerate(records)
    ]


def prepare_pairs(system: CompoundSystem, records: Sequence[PreferenceRecord], known: Known | None = None) -> PairBatch:
    """Both sides as raw feature trees, all in memory at once.

    What frozen parts encode is left to `Trainer.fit`, or to `CompoundSystem.encode`. For more records than fit in
    memory, and batches of rows of like lengths, use `preference_dataset`.

    Args:
        system: What they are prepared for.
        records: With intermediates.
        known: See `CompoundSystem.complete`; what a tool gives of the inputs alone is asked for once for both sides.

    Returns:
        NumPy arrays with a leading axis of `len(records)`.

    Raises:
        RecordError: As `prepare` does, and for records without intermediates.
    """
    known = {} if known is None else known
    require_intermediates(system, hold_intermediates(system, records, known))
    return PairBatch(*share(system, prepare_sides(system, [record.runs() for record in records], known=known)))


def prepare_sides(
    system: CompoundSystem,
    pairs: Sequence[Sequence[Record]],
    names: Sequence[str] | None = None,
    known: Known | None = None,
    what: str = "runs",
) -> list[dict[str, Features]]:
    """The features of the chosen runs and of the rejected ones, prepared together: images of both get one size.

    names: of the nodes, all by default. what: runs are called so in errors. Raises `RecordError` naming the side.
    """
    sides, known = [[pair[place] for pair in pairs] for place in range(len(SIDES))], {} if known is None else known
    try:
        both = system.prepare([run for side in sides for run in side], names, known)
    except RecordError:
        for name, side in zip(SIDES, sides, strict=True):
            try:
                system.prepare(side, names, known)
            except RecordError as error:
                raise RecordError(f"{name} {what}: {error}") from error
        raise
    return [jax.tree.map(lambda x, side=side: np.split(x, 2)[side], both) for side in range(len(SIDES))]
