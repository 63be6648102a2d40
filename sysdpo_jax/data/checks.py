"""Whether records fit a system, before anything is trained on them: names, types, texts that fit, images that open."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.images import open_picture
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.prompts import fitted
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.records import SIDES, PreferenceRecord
from sysdpo_jax.data.tools import with_tools
from sysdpo_jax.graph import CompoundSystem, Known, Node


def check_records(system: CompoundSystem, records: Sequence[PreferenceRecord], known: Known | None = None) -> None:
    """Raise `RecordError` naming side and field for a record that the system cannot be trained on.

    Names must be the system's, and every final value there; `check_intermediates` sees to the others. Images must
    decode. With intermediate values the other nodes are prepared, so that texts without room are found; without them
    the prompts of models that read inputs alone, and the lengths of final texts. Tools that models read must not fail:
    known keeps what they gave, see `CompoundSystem.complete`.
    """
    known = {} if known is None else known
    for record in records:
        _check_names("inputs", record.inputs, system.inputs)
        _check_inputs(system, record.inputs)
        for side in SIDES:
            _check_side(system, side, getattr(record, side))
    for side in SIDES:
        try:
            _check_rows(system, [{**record.inputs, **getattr(record, side)} for record in records], known)
        except ToolError as error:
            raise error.at(side) from error.__cause__
        except RecordError as error:
            # Of one record the row's number says nothing.
            raise RecordError(f"{side}, {re.sub(' in row 0(?= |$|:)', '', str(error))}") from error


def _check_rows(system: CompoundSystem, rows: Sequence[Mapping[str, Any]], known: Known) -> None:
    """Tools are called, and what models read is prepared, but for images."""
    filled = with_tools(system, rows, known)
    for row in filled:
        if isinstance(row, ToolError):
            raise row
    inner = [node.name for node in system.intermediates]
    whole = [row for row in filled if all(name in row for name in inner)]
    final = [row for row in filled if inner and not any(name in row for name in inner)]
    nodes = [n.name for n in system.nodes if not n.deterministic and not isinstance(n.component, TextToImage)]
    if whole and nodes:
        system.prepare(whole, nodes)
    if final:
        _check_texts(system, final)


def _check_texts(system: CompoundSystem, rows: Sequence[Mapping[str, Any]]) -> None:
    """Of rows without intermediate values what can be known of texts: the rest depends on what will be drawn."""
    for node in system.nodes:
        model = node.component
        if not isinstance(model, LanguageModel):
            continue
        if set(node.parents) <= set(system.inputs):
            blank = "" if node.plate is None else [""] * node.plate
            system.prepare([{node.name: blank, **row} for row in rows], [node.name])
        elif node in system.outputs and model.truncation == "error":
            values = [value for row in rows for value in (row[node.name] if node.plate else [row[node.name]])]
            texts = [value if isinstance(value, str) else "" for value in values]
            rows_of_ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
            try:
                for place, ids in enumerate(rows_of_ids):
                    # An empty one has an end at least.
                    if ids:
                        row_number = place // (node.plate or 1)
                        fitted(ids, model.max_new_tokens, "error", "completion", "max_new_tokens", row_number)
            except RecordError as error:
                raise RecordError(f"node {node.name!r}: {error}") from error


def resolve_images(system: CompoundSystem, record: PreferenceRecord, folder: Path) -> PreferenceRecord:
    """The record with paths of images taken from the folder that its file lies in."""
    names = {node.name for node in system.nodes if isinstance(node.component, TextToImage)}

    def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _below(value, folder) if name in names else value for name, value in values.items()}

    return PreferenceRecord(record.inputs, resolved(record.chosen), resolved(record.rejected))


def _below(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_below(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) else value


def _check_side(system: CompoundSystem, side: str, values: Mapping[str, Any]) -> None:
    _check_names(side, values, [node.name for node in system.nodes])
    missing = [node.name for node in system.outputs if node.name not in values]
    if missing:
        raise RecordError(f"{side} lacks the field {missing[0]!r}: add it")
    for node in system.nodes:
        if node.name in values and not node.deterministic:
            where = f"{side}, field {node.name!r}"
            for value in _copies(node, values[node.name], where):
                _check_value(node, value, where)


def _copies(node: Node, value: Any, where: str) -> Sequence[Any]:
    if node.plate is None:
        return [value]
    if not isinstance(value, list) or len(value) != node.plate:
        has = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
        raise RecordError(f"{where}: {has} instead of a list of {node.plate}, one for each copy")
    return value


def _check_value(node: Node, value: Any, where: str) -> None:
    if isinstance(node.component, TextToImage):
        if not isinstance(value, str | bytes):
            raise RecordError(f"{where} is {type(value).__name__}: give the path of an image, or its bytes")
        open_picture(value, where)


def _check_names(where: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"the system has {', '.join(known)}"
            raise RecordError(f"{where}, field {name!r} is no name of the system: {meant}")


def _check_inputs(system: CompoundSystem, inputs: Mapping[str, Any]) -> None:
    for name in system.inputs:
        if name not in inputs:
            raise RecordError(f"inputs lacks the field {name!r}: add it")
        # A system may answer with nothing, but nobody asks it nothing.
        if isinstance(inputs[name], str) and not inputs[name].strip():
            raise RecordError(f"inputs, field {name!r} is empty: write a text, or drop the row")
