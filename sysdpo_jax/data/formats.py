"""Rows of data sets that exist -> preference records. Readers refuse what they do not read, see `refuse_unread`."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.conversations import (
    ARGUMENTS,
    MESSAGES,
    TOOLS,
    is_messages,
    kind,
    read_arguments,
    read_messages,
    read_tools,
)
from sysdpo_jax.components.images import open_picture
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.data.annotations import Said, argilla_answers, label_studio_answers, responses_of
from sysdpo_jax.data.files import file_state
from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.data.rollouts import Pairs, preferred
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.row_files import pack
from sysdpo_jax.user_code import import_function, is_users, name_of, shown, user_code
from sysdpo_jax.values import from_json

# States of files.
States: TypeAlias = dict[str, tuple[int, int]]


class Names(NamedTuple):
    """The system's only input and only final value, where data sets do not name them."""

    input: str
    output: str


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
# How the sides of a row were made and judged, as data sets in TRL's formats say it.
ABOUT_SIDES = tuple(
    name
    for side in ("chosen", "rejected")
    for what in ("score", "rating", "model")
    for name in (f"{what}_{side}", f"{side}_{what}", f"{side}-{what}")
)
# What Pick-a-Pic says of where its images come from.
ABOUT_IMAGES = (
    *(f"image_{place}_{what}" for place in (0, 1) for what in ("uid", "url")),
    *("model_0", "model_1", "best_image_uid", "are_different", "ranking_id", "user_id", "created_at"),
    "num_example_per_prompt",
)

# A row -> its records, none for a tie.
Reader = Callable[[Mapping[str, Any], CompoundSystem | None], list[PreferenceRecord]]


def records(row: Mapping[str, Any], system: CompoundSystem | None = None) -> list[PreferenceRecord]:
    """{"inputs": {name: value}, "chosen": {node: value}, "rejected": {node: value}}: the library's own schema."""
    for name in ("inputs", "chosen", "rejected"):
        if not isinstance(row.get(name), Mapping):
            hint = "" if "inputs" in row else "; rows with texts or messages are for the reader trl"
            raise RecordError(f"the field {name!r} must be an object of named values{hint}")
    refuse_unread(row, ("inputs", "chosen", "rejected"))
    return [PreferenceRecord(*(_present(row[name]) for name in ("inputs", "chosen", "rejected")))]


def trl(row: Mapping[str, Any], system: CompoundSystem | None) -> list[PreferenceRecord]:
    """TRL's preference formats: prompt, chosen and rejected, as strings or as lists of messages.

    Without a prompt it is what chosen and rejected have in common at their start: messages, or text up to a word. A
    prompt in text beside messages is the user's first turn, which the messages may begin with or not. tools and
    chat_template_kwargs, of messages alone, go to the chat template.
    """
    names = only_names(system)
    chosen, rejected = (_text_or_messages(row, name) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise RecordError("chosen and rejected must both be strings or both be lists of messages")
    refuse_unread(row, ("prompt", "chosen", "rejected", TOOLS, ARGUMENTS), ABOUT_SIDES)
    prompt = None if row.get("prompt") is None else _text_or_messages(row, "prompt")
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        start = _common(chosen, rejected)
        shared: Any = chosen[:start]
        chosen, rejected = chosen[start:], rejected[start:]
        if prompt is not None and all(turn["role"] != "user" for turn in shared):
            shared = [*shared, {"role": "user", "content": prompt}]
        if not shared:
            raise RecordError("chosen and rejected have no start in common: add the field 'prompt'")
        prompt = shared
    return [
        PreferenceRecord({names.input: _with_extras(prompt, row)}, {names.output: chosen}, {names.output: rejected})
    ]


def pick_a_pic(row: Mapping[str, Any], system: CompoundSystem | None) -> list[PreferenceRecord]:
    """Pick-a-Pic (arXiv 2305.01569): caption, jpg_0 and jpg_1 (bytes), label_0: 1, 0, or 0.5 for a tie.

    label_1, where it is given, is 1 - label_0; a row whose has_label is false says nothing of preference.
    """
    names = only_names(system)
    missing = [name for name in ("caption", "jpg_0", "jpg_1", "label_0") if row.get(name) is None]
    if missing:
        raise RecordError(f"the field {missing[0]!r} is missing: give caption, jpg_0, jpg_1 and label_0")
    refuse_unread(row, ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"), ABOUT_IMAGES)
    if row.get("has_label") in (False, 0):
        return []
    if row["label_0"] not in (0, 0.5, 1):
        raise RecordError(f"the field 'label_0' is {row['label_0']!r}: give 1, 0, or 0.5 for a tie")
    if row.get("label_1") not in (None, 1 - row["label_0"]):
        raise RecordError(
            f"the fields 'label_0' {row['label_0']!r} and 'label_1' {row['label_1']!r} do not add up to 1"
        )
    if row["label_0"] == 0.5:
        return []
    first, second = ({names.output: row[name]} for name in ("jpg_0", "jpg_1"))
    sides = (first, second) if row["label_0"] == 1 else (second, first)
    return [PreferenceRecord({names.input: row["caption"]}, *sides)]


@dataclass(frozen=True)
class Ranked:
    """A reader of {"inputs": ..., "outputs": [n values], "scores": [n numbers]}; higher scores are better.

    inputs: {name: value}, or the value of the system's only input. outputs: {node: value} each, or values of the only
    final node.

    Args:
        pairs: The best against the worst, or all whose scores differ.
        min_margin: Smallest difference that is kept.
    """

    pairs: Pairs = "best_worst"
    min_margin: float = 0.0

    def __call__(self, row: Mapping[str, Any], system: CompoundSystem | None = None) -> list[PreferenceRecord]:
        """Turn a row into preferences.

        Args:
            row: As above.
            system: For values without names.

        Returns:
            A record for each pair.

        Raises:
            RecordError: For a row of another form, naming the field.
        """
        missing = [name for name in ("inputs", "outputs", "scores") if row.get(name) is None]
        if missing:
            raise RecordError(f"the field {missing[0]!r} is missing: give inputs, outputs and scores")
        refuse_unread(row, ("inputs", "outputs", "scores"))
        outputs, scores = row["outputs"], row["scores"]
        if not isinstance(outputs, list) or not isinstance(scores, list) or len(outputs) != len(scores):
            raise RecordError("the fields 'outputs' and 'scores' must be lists of one length")
        if len(outputs) < 2:
            raise RecordError(f"the field 'outputs' has {len(outputs)} values: a preference needs two")
        for place, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
                raise RecordError(f"the field 'scores' has {score!r} at place {place}: give finite numbers")
        inputs = row["inputs"] if isinstance(row["inputs"], Mapping) else {only_names(system).input: row["inputs"]}
        sides = [side if isinstance(side, Mapping) else {only_names(system).output: side} for side in outputs]
        pairs = preferred(np.array(scores, np.float64), self.pairs, self.min_margin)
        return [PreferenceRecord(_present(inputs), _present(sides[a]), _present(sides[b])) for a, b in pairs]


def label_studio(row: Mapping[str, Any], system: CompoundSystem | None) -> list[PreferenceRecord]:
    """A task of Label Studio's JSON export with the data prompt, answer1 and answer2, or text1 and text2.

    Each annotation is a preference; left is the first one. Raises `RecordError` for tasks of another form.
    """
    data = row.get("data")
    if not isinstance(data, Mapping) or not isinstance(row.get("annotations"), list):
        raise RecordError("the fields 'data' and 'annotations' must be there: export as JSON, not as JSON-MIN")
    sides = ("answer1", "answer2") if "answer1" in data else ("text1", "text2")
    return _judged(data, sides, lambda: label_studio_answers(row), system)


def argilla(row: Mapping[str, Any], system: CompoundSystem | None) -> list[PreferenceRecord]:
    """A record of Argilla with the fields prompt, response1 and response2, of `to_json` or `to_datasets`.

    Each person's answer is a preference. Raises `RecordError` for records of another form.
    """
    sides = ("response1", "response2")
    return _judged(row.get("fields") or row, sides, lambda: argilla_answers(responses_of(row), sides), system)


def _judged(
    texts: Mapping[str, Any], sides: tuple[str, str], read: Callable[[], list[Said]], system: CompoundSystem | None
) -> list[PreferenceRecord]:
    """A preference for each answer that is one, on the two texts of a prompt. read: gives the answers."""
    missing = [name for name in ("prompt", *sides) if not isinstance(texts.get(name), str)]
    if missing:
        runs = "; what `sysdpo annotate` exported is for its --answers" if "left" in texts else ""
        raise RecordError(f"the field {missing[0]!r} must be a text: prompt, {' and '.join(sides)} are read{runs}")
    try:
        answers = read()
    except RecordError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"the answers are not of the form that the tool writes ({error!r}): export it again"
        ) from None
    names, (first, second) = only_names(system), [{only_names(system).output: texts[name]} for name in sides]
    pairs = {"left": (first, second), "right": (second, first)}
    return [PreferenceRecord({names.input: texts["prompt"]}, *pairs[said]) for said, *_ in answers if said in pairs]


READERS: dict[str, Reader] = {
    "records": records,
    "trl": trl,
    "pick_a_pic": pick_a_pic,
    "ranked": Ranked(),
    "ranked_all": Ranked("all"),
    "label_studio": label_studio,
    "argilla": argilla,
}


def reader_of(name: str, field: str = "reader") -> Reader:
    """The reader of that name in `READERS`, or the function "module:name". field: that says so, for errors.

    Raises `ConfigError` where there is none.
    """
    if name in READERS:
        return READERS[name]
    if ":" in name:
        return import_function(name, field)
    near = meant(name, READERS)
    raise ConfigError(f"{field}: unknown reader {name!r}: {near} (or write module:name of a function of your own)")


def call_reader(convert: Reader, row: Mapping[str, Any], system: CompoundSystem | None) -> list[PreferenceRecord]:
    """The records of a row. Raises `RecordError` where a reader of the user's fails, or returns something else."""
    if not is_users(convert):
        return convert(row, system)
    with user_code(f"the reader {name_of(convert)}", RecordError, (RecordError,)):
        made: Any = convert(row, system)
        # Here, because a generator runs only now.
        found = list(made) if isinstance(made, Iterable) else made
    if not isinstance(found, list) or not all(isinstance(record, PreferenceRecord) for record in found):
        raise RecordError(
            f"the reader {name_of(convert)} returned {shown({'value': made})}: return a list of PreferenceRecord, none "
            "for a tie"
        )
    return found


def placed(record: PreferenceRecord, system: CompoundSystem | None, folder: Path, images: States) -> PreferenceRecord:
    """The record with paths of images taken from a folder, the source's. images: gets the state of each file."""
    nodes = () if system is None else system.nodes
    names = {node.name for node in nodes if isinstance(node.component, TextToImage)}

    def below(value: Any) -> Any:
        if isinstance(value, list):
            return [below(item) for item in value]
        if isinstance(value, Image.Image):
            return open_picture(value, "an image of the reader")
        if not isinstance(value, str):
            return value
        found = str(folder / value)
        images[found] = file_state(found)
        return found

    def found_in(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, **{name: below(values[name]) for name in names & values.keys()}}

    sides = [found_in(side) for side in (record.chosen, record.rejected)]
    for side in sides:
        for name in () if system is None else system.bodies.keys() & side.keys():
            side[name] = [found_in(turn) if isinstance(turn, Mapping) else turn for turn in side[name]]
    return PreferenceRecord(record.inputs, *sides)


def require_holdable(convert: Reader, record: PreferenceRecord) -> None:
    """Raise `RecordError` for a value of a user's reader that no file of rows can hold."""
    try:
        json.dumps(pack([record.inputs, record.chosen, record.rejected], lambda leaf: 0))
    except TypeError as error:
        raise RecordError(
            f"the reader {name_of(convert)} gave a value that no file can hold ({error}): give texts, "
            "numbers, lists, objects, bytes, arrays of numbers or images"
        ) from None


def only_names(system: CompoundSystem | None) -> Names:
    """Raises `ValueError` unless the system has exactly one input and one final value."""
    if system is None:
        raise ValueError("this reader names no nodes: pass the system, whose input and final value it then takes")
    if len(system.inputs) != 1 or len(system.outputs) != 1:
        outputs = ", ".join(node.name for node in system.outputs)
        raise ValueError(
            f"this reader needs a system with one input and one final value, not {', '.join(system.inputs)} and "
            f"{outputs}: write the records with names, for the reader 'records'"
        )
    return Names(system.inputs[0], system.outputs[0].name)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are there, sampled texts with their tokens; a table has None for a name that a row lacks."""
    return {name: from_json(value) for name, value in values.items() if value is not None}


def _text_or_messages(row: Mapping[str, Any], name: str) -> str | list[Any]:
    value = row.get(name)
    if isinstance(value, str):
        if not value.strip():
            raise RecordError(f"the field {name!r} is empty: write a text, or drop the row")
        return value
    if is_messages(value):
        return read_messages(value, f"the field {name!r}")
    other = "; objects of named values are for the reader records" if isinstance(value, Mapping) else ""
    raise RecordError(f"the field {name!r} must be a string or a list of messages, not {kind(value)}{other}")


def _with_extras(prompt: str | list[Any], row: Mapping[str, Any]) -> Any:
    """The prompt with what the row gives its chat template beside the messages."""
    tools = read_tools(row.get(TOOLS), f"the field {TOOLS!r}")
    arguments = read_arguments(row.get(ARGUMENTS), f"the field {ARGUMENTS!r}")
    extras = {name: value for name, value in ((TOOLS, tools), (ARGUMENTS, arguments)) if value}
    if extras and isinstance(prompt, str):
        raise RecordError(f"the field {next(iter(extras))!r} is for a chat template: give prompt and sides as messages")
    return {MESSAGES: prompt, **extras} if extras else prompt


def _common(first: str | list[Any], second: str | list[Any]) -> int:
    """The length of the common start. A text's ends after a word; a space behind it begins both completions."""
    short = min(len(first), len(second))
    length = next((place for place in range(short) if first[place] != second[place]), short)
    if isinstance(first, list):
        # A turn of the assistant that both begin with is the prompt's; the last one never is.
        return min(length, len(first) - 1, len(second) - 1)
    while length and not first[length - 1].isspace():
        length -= 1
    return length - 1 if first[:length].endswith(" ") else length


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
        lacking = [other for other in read if is_empty(row.get(other))]
        hint = REMEDIES.get(name) or meant(name, lacking, "give it a name that is read", cut=0.8)
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
