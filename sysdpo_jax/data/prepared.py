"""Records made ready for the step: prepared, encoded, and kept on disk at their own sizes.

A record is usable if and only if features can be made of it here; nothing else checks.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sysdpo_jax.batch import PairBatch, share
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import Tool, ToolError
from sysdpo_jax.components.tool_values import Kept, ToolValues
from sysdpo_jax.data.files import file_state
from sysdpo_jax.data.records import SIDES, PreferenceRecord, check_intermediates, check_names
from sysdpo_jax.data.row_features import RUNS, at_own_size, kind, merged, routed_nodes, runs_of, stacked
from sysdpo_jax.graph import CompoundSystem, Known, Node
from sysdpo_jax.io import read_arrays, write_arrays
from sysdpo_jax.nodes import naming
from sysdpo_jax.row_files import RowFile, write_row_file
from sysdpo_jax.typing import Features, Params, Record
from sysdpo_jax.user_code import is_users
from sysdpo_jax.values import is_plain

# {side: {node: features of one row}}, without a leading axis.
Sides = Mapping[str, Mapping[str, Features]]
# (node, axis of `Component.sizes`).
Axis = tuple[str, str]
# Files of rows that are mapped at a time.
OPEN = 256
# Ends the name of what says which rows a part has.
INDEX = ".index.npz"
# Beside 0 and 1 in it: a record in which no intermediate runs neither holds nor lacks any.
UNDECIDED = -1


class Prepared(NamedTuple):
    """A record ready for the step.

    record: with what tools gave, where files can hold it. held: whether it has the intermediate values, None where none
    runs. features: of a record that does not lack them, at its own sizes; None where nothing could encode them. sizes:
    the largest of both sides and all copies and runs.
    """

    record: PreferenceRecord
    held: bool | None
    features: Sides | None
    sizes: Mapping[Axis, int]


def with_kept_values(system: CompoundSystem, values: ToolValues) -> CompoundSystem:
    """The system with tools that ask `values` first, and add what they gave as soon as a call returns."""

    def kept(node: Node) -> Node:
        tool = node.component
        if not isinstance(tool, Tool):
            return node
        return replace(node, component=replace(tool, function=Kept(node.name, tool.function, values)))

    return replace(system, nodes=tuple(map(kept, system.nodes)))


def about_system(system: CompoundSystem | None) -> list[Any]:
    """What features depend on beside the frozen parts: of the nodes neither weights nor what only the step reads."""
    if system is None:
        return []
    nodes = []
    for node in system.nodes:
        kind = type(node.component)
        # What a class of the user's own prepares by is known where it says so itself.
        known = not is_users(kind) or "prepared_by" in vars(kind)
        about = node.component.prepared_by if known else node.component
        nodes.append([node.name, node.parents, node.weights_key, node.plate, node.loop, kind, about])
    failing = [node.component.on_error for node in system.nodes if isinstance(node.component, Tool)]
    return [system.inputs, nodes, failing]


def prepare_in_groups(
    system: CompoundSystem | None,
    params: Params | None,
    found: Iterable[tuple[int, PreferenceRecord | RecordError]],
    together: int,
) -> Iterator[tuple[int, Prepared | RecordError]]:
    """Numbered records ready for the step, or why they cannot be used, in their order.

    found: a record, or why there is none. Of those before an error the outcome comes first: who stops at it prepares
    nothing behind it. together: records that are prepared at once.
    """
    waiting: list[tuple[int, PreferenceRecord]] = []

    def ready() -> Iterator[tuple[int, Prepared | RecordError]]:
        if waiting:
            numbers, records = zip(*waiting, strict=True)
            waiting.clear()
            yield from zip(numbers, prepare_records(system, params, records), strict=True)

    for number, record in found:
        if isinstance(record, RecordError):
            yield from ready()
            yield number, record
            continue
        waiting.append((number, record))
        if len(waiting) >= together:
            yield from ready()
    yield from ready()


def prepare_records(
    system: CompoundSystem | None, params: Params | None, records: Sequence[PreferenceRecord]
) -> Iterator[Prepared | RecordError]:
    """Every record ready for the step, or why it cannot be used: naming the side, and the node or the field.

    params: those whose frozen parts encode. Without them records are prepared but their features are not kept, if the
    system encodes anything.
    """
    if system is None:
        yield from (Prepared(record, True, None, {}) for record in records)
        return
    # Of these records: prepared once more, or on both sides, a tool is not called again.
    known: Known = {}
    try:
        yield from _together(system, params, records, known)
        return
    except RecordError as error:
        if len(records) == 1:
            yield error
            return
    # One after the other as they are asked for: who stops at an error calls no further tool.
    for record in records:
        try:
            [made] = _together(system, params, [record], known)
        except RecordError as error:
            yield error
        else:
            yield made


def write_part(
    path: Path, system: CompoundSystem | None, rows: Iterable[tuple[int, Prepared]], about: Callable[[], Any]
) -> None:
    """Write records with the numbers of their rows. The index comes last: it says that all is there.

    about: JSON that is kept with them, asked for when all rows are written.
    """
    numbers, held, sizes, kinds = list[int](), list[int](), list[Mapping[Axis, int]](), list[int]()
    routed = [] if system is None else routed_nodes(system)
    runs: list[list[int]] = []
    shapes: dict[str, int] = {}

    def noted() -> Iterable[Any]:
        for number, row in rows:
            numbers.append(number)
            held.append(UNDECIDED if row.held is None else row.held)
            sizes.append(row.sizes)
            found = [] if row.features is None else [row.features[side] for side in SIDES]
            own = kind(system, found) if system is not None and found else ""
            kinds.append(shapes.setdefault(own, len(shapes)))
            runs.append([sum(runs_of(side[name]) for side in found) for name in routed])
            yield {"record": [row.record.inputs, row.record.chosen, row.record.rejected], "features": row.features}

    count = write_row_file(path, noted())
    axes = sorted({axis for row in sizes for axis in row})
    order = [] if system is None else [node.name for node in system.nodes]
    texts = {"axes": axes, "order": order, "routed": routed, "about": about()}
    told = {name: np.array(json.dumps(value)) for name, value in texts.items()}
    told["runs"] = np.array(runs, np.int32).reshape(count, len(routed))
    columns: dict[str, np.ndarray] = {"numbers": np.array(numbers, np.int64), "held": np.array(held, np.int8)}
    columns |= {"kinds": np.array(kinds, np.int64), "shapes": np.array([*shapes], str)}
    # Those without features have no sizes; where a node did not run, what is computed in its stead has one place.
    whole = [[row.get(axis, 1 if row else 0) for axis in axes] for row in sizes]
    columns["sizes"] = np.array(whole, np.int32).reshape(count, len(axes))
    write_arrays(path.with_name(f"{path.name}{INDEX}"), columns | told)


def part_about(path: Path) -> Any:
    """What `write_part` was told about a part; None where it is not there, or not whole."""
    there = path.with_name(f"{path.name}{INDEX}").exists()
    return json.loads(str(_index(path)["about"])) if there else None


def is_fresh(part: Path) -> bool:
    """Whether a part is there, and made of images that are as they were."""
    about = part_about(part)
    return about is not None and all(file_state(path) == tuple(state) for path, state in about["files"])


class PreparedRows:
    """The rows of parts that `write_part` made, by number; what says how to put them together is in memory.

    numbers: of the rows of the source [rows]; held: whether they hold intermediate values, or UNDECIDED [rows]; sizes
    [rows, axes]; kinds: rows of one number can be in a batch [rows]; runs: of `routed` nodes on both sides [rows,
    nodes].
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths, parts = list(paths), [_index(path) for path in paths]
        self._ends = np.cumsum([len(part["numbers"]) for part in parts])
        self.numbers, self.held = (np.concatenate([part[name] for part in parts]) for name in ("numbers", "held"))
        # A part without features does not know the axes, and one in which a node never ran not all of them.
        own = [[(node, axis) for node, axis in json.loads(str(part["axes"]))] for part in parts]
        order: list[str] = json.loads(str(parts[0]["order"]))
        known = {axis for axes in own for axis in axes}
        self.axes: tuple[Axis, ...] = tuple(sorted(known, key=lambda axis: (order.index(axis[0]), axis[1])))
        self.sizes = np.concatenate([_columns(*pair, self.axes) for pair in zip(parts, own, strict=True)])
        self.routed: list[str] = json.loads(str(parts[0]["routed"]))
        self.runs = np.concatenate([part["runs"] for part in parts])
        shapes = np.concatenate([part["shapes"] for part in parts])
        ends = np.cumsum([0, *(len(part["shapes"]) for part in parts)])
        kinds = np.concatenate([start + part["kinds"] for start, part in zip(ends[:-1], parts, strict=True)])
        numbers = np.bincount(kinds, minlength=len(shapes)).tolist()
        self.kinds = np.array(merged(shapes.tolist(), numbers), np.int64)[kinds]
        self._file = lru_cache(OPEN)(lambda path: RowFile(path, remedy(path)))
        self._example = lru_cache(None)(self._find_example)

    def __len__(self) -> int:
        return len(self.numbers)

    def record(self, row: int) -> PreferenceRecord:
        """The record of a row."""
        return PreferenceRecord(*self._entry(row, "record"))

    def features(self, row: int) -> Sides:
        """The features of a row that has some."""
        found: Sides = self._entry(row, "features")
        return found

    def example(self, name: str, row: int) -> Any:
        """Features of runs of a routed node in a record of the same kind as this row; None where it never ran."""
        return self._example(name, int(self.kinds[row]))

    def _find_example(self, name: str, kind: int) -> Any:
        found = np.flatnonzero((self.kinds == kind) & (self.runs[:, self.routed.index(name)] > 0))
        sides = self.features(int(found[0])).values() if len(found) else ()
        return next((side[name][RUNS] for side in sides if side[name][RUNS] is not None), None)

    def _entry(self, row: int, name: str) -> Any:
        part = int(np.searchsorted(self._ends, row, "right"))
        first = int(self._ends[part - 1]) if part else 0
        return self._file(self._paths[part]).entry(row - first, name)


def _index(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path.with_name(f"{path.name}{INDEX}"), remedy(path))


def remedy(path: Path) -> str:
    """What to do about a damaged file of a part."""
    return f"remove the folder {path.parent}, whose files are made anew"


def _columns(part: Mapping[str, np.ndarray], own: Sequence[Axis], axes: Sequence[Axis]) -> np.ndarray:
    """The sizes of a part by all axes: 1 along those that it does not know, of nodes that did not run in it."""
    made = np.ones((len(part["numbers"]), len(axes)), np.int32)
    for place, axis in enumerate(own):
        made[:, axes.index(axis)] = part["sizes"][:, place]
    return made


def pair_batch(
    system: CompoundSystem, rows: Sequence[Sides], sizes: Mapping[Axis, int], example: Callable[[str], Any]
) -> PairBatch:
    """The batch of these rows, all of them at these sizes, which they fit in.

    example: gives features of a run of a routed node, None where there is none anywhere.
    """
    routed = routed_nodes(system)

    def of_node(side: str, node: Node) -> Features:
        own = {axis: size for (name, axis), size in sizes.items() if name == node.name}
        given = [row[side][node.name] for row in rows]
        is_routed = node.name in routed
        return stacked(node, given, own, is_routed, example(node.name) if is_routed else None)

    return PairBatch(*({node.name: of_node(side, node) for node in system.nodes} for side in SIDES))


def _together(
    system: CompoundSystem, params: Params | None, records: Sequence[PreferenceRecord], known: Known
) -> list[Prepared]:
    """All of the records. Raises `RecordError`, which says all there is to say where there is but one."""
    held = []
    for record in records:
        check_names(system, record)
        held.append(check_intermediates(system, record, known=known))
    # A record in which no intermediate runs lacks none.
    holds = held[0] is not False
    if any((own is not False) != holds for own in held):
        raise RecordError("some of the records hold intermediate values")
    runs = [run for record in records for run in record.runs()]
    filled = _with_tools(system, runs, holds, known)
    try:
        features = _features(system, params, filled, holds)
    except RecordError as error:
        raise _with_side(system, filled, holds, error) from error
    tools = [node.name for node in system.nodes if node.deterministic]
    made = []
    for record, run, other, own_held, row in zip(records, filled[::2], filled[1::2], held, features, strict=True):
        sides = []
        for own, whole in ((record.chosen, run), (record.rejected, other)):
            # With what tools gave and files can hold as it is; turns have it inside them.
            lacking = [name for name in tools if name in system.bodies or name not in own]
            sides.append({**own, **{name: whole[name] for name in lacking if name in whole and is_plain(whole[name])}})
        made.append(Prepared(PreferenceRecord(record.inputs, *sides), own_held, *row))
    return made


def _with_side(system: CompoundSystem, runs: Sequence[Record], held: bool, error: RecordError) -> RecordError:
    """The error with its side in front, if it is one side's; of a single run the row's number says nothing."""
    for side, run in zip(SIDES, runs, strict=False) if len(runs) == len(SIDES) else ():
        try:
            _features(system, None, [run], held)
        except RecordError as own:
            return RecordError(f"{side}, {re.sub(' in row 0(?= |$|:)', '', str(own))}")
    return error


def _with_tools(system: CompoundSystem, runs: Sequence[Record], held: bool, known: Known) -> list[dict[str, Any]]:
    """The runs with the values that they lack of tools that a model reads; without intermediates of `system.given`."""
    every = [node.name for node in system.nodes if not node.deterministic]
    given = {node.name for node in system.given}
    names = every if held else [node.name for node in system.with_ancestors(every) if node.name in given]
    made = system.complete(runs, names, known)
    for place, run in enumerate(made):
        if isinstance(run, ToolError):
            raise run.at(SIDES[place % 2]) from run.__cause__
    return made


def _features(
    system: CompoundSystem, params: Params | None, runs: Sequence[Record], held: bool
) -> list[tuple[Sides | None, Mapping[Axis, int]]]:
    """(features, sizes) of every two runs, the sides of a record; none where there is nothing to keep."""
    nothing: list[tuple[Sides | None, Mapping[Axis, int]]] = [(None, {})] * (len(runs) // 2)
    if not held:
        _check_final(system, runs)
        return nothing
    # A component of several sizes gives all values of a call the same one: both sides of a pair, and all copies.
    alone = [node.name for node in system.nodes if node.component.several_sizes]
    together = [node.name for node in system.nodes if node.name not in alone]
    raw = system.prepare(runs, together)
    own = [system.prepare(runs[start : start + 2], alone) for start in range(0, len(runs), 2)] if alone else []
    if params is None:
        if system.encodes:
            return nothing
        params = {}
    whole = system.encode(params, raw)
    made = nothing
    for number in range(len(runs) // 2):
        pair = jax.tree.map(lambda x, at=2 * number: x[at : at + 2], whole)
        made[number] = _at_own_sizes(system, pair | (system.encode(params, own[number]) if alone else {}))
    return made


def _at_own_sizes(system: CompoundSystem, pair: Mapping[str, Features]) -> tuple[Sides, Mapping[Axis, int]]:
    """Both sides of a record, features [2, ...], each at its own sizes; and the larger ones."""
    both = share(system, [jax.tree.map(lambda x, at=place: x[at : at + 1], pair) for place in range(len(SIDES))])
    sides: dict[str, dict[str, Features]] = {side: {} for side in SIDES}
    sizes: dict[Axis, int] = {}
    for node in system.nodes:
        for name, run in zip(SIDES, both, strict=True):
            sides[name][node.name], own = at_own_size(node, run[node.name])
            for axis, size in own.items():
                sizes[node.name, axis] = max(size, sizes.get((node.name, axis), 0))
    return sides, sizes


def _check_final(system: CompoundSystem, runs: Sequence[Record]) -> None:
    """Of runs without intermediate values what can be known: the rest depends on what will be drawn.

    Raises `RecordError` for prompts of models that read what is there, and for texts and images that no parents could
    make fit.
    """
    for node in system.nodes:
        model: Any = node.component
        here, asked = node.name in runs[0], all(parent in runs[0] for parent in node.parents)
        if not node.has_params or system.is_routed(node):
            # Whether a branch runs depends on what will be drawn.
            continue
        if asked and (here or isinstance(model, LanguageModel)):
            blank = "" if node.plate is None else [""] * node.plate
            system.prepare([{node.name: blank, **run} for run in runs], [node.name])
        elif here and isinstance(model, LanguageModel | TextToImage):
            # Its parents will be drawn: it stands behind a stand-in for them.
            values = [value for run in runs for value in (run[node.name] if node.plate else [run[node.name]])]
            parent = {"caption": [""] * len(values)}
            if isinstance(model, LanguageModel):
                # Messages need the ones before them, which are not known.
                values = [value if isinstance(value, str) else "" for value in values]
                model, parent = replace(model, prompt=None), {"prompt": ["."] * len(values)}
            with naming(node):
                model.prepare(values, parent)
