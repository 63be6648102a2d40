"""Comparisons as tasks of Label Studio and of Argilla, and what people answered there.

Both get a run as HTML: https://labelstud.io/tags/hypertext, and a text field with `use_markdown`
(https://docs.argilla.io/latest/how_to_guides/dataset). Argilla shows pictures inside of it; Label Studio takes them
out, and shows them in tags of their own, https://labelstud.io/tags/repeater. The id of a comparison goes there and
back, and says nothing of where its runs are from.
"""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sysdpo_jax.annotation.answers import Judgement
from sysdpo_jax.annotation.comparisons import Comparison
from sysdpo_jax.annotation.page import Picture, fragment, shown
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.annotations import Said, argilla_answers, label_studio_answers
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import read_text

Tool = Literal["label_studio", "argilla"]
Json = dict[str, Any]


def tasks(comparisons: Sequence[Comparison], nodes: Sequence[str], tool: Tool) -> list[Json]:
    """The comparisons as the tool imports them.

    Label Studio: {"data": ...} each, https://labelstud.io/guide/tasks#Basic-Label-Studio-JSON-format. Argilla: what
    `dataset.records.from_json` reads, https://docs.argilla.io/latest/reference/argilla/records/records.
    """
    made = []
    for each in comparisons:
        it = shown(each, nodes, _inside)
        values = {"inputs": it.inputs, "left": it.left, "right": it.right}
        if tool == "argilla":
            made.append({"id": each.id, "fields": {part: fragment(own) for part, own in values.items()}})
            continue
        data: Json = {"pair": each.id}
        for part, own in values.items():
            pictures = list[Json]()
            data |= {part: fragment(_apart(own, pictures)), f"{part}_pictures": pictures}
        made.append({"data": data})
    return made


def _apart(value: Any, found: list[Json]) -> Any:
    """The value with words in the place of pictures. found: gets the pictures."""
    if isinstance(value, Picture):
        found.append({"url": value.source})
        return f"(picture {len(found)} below)"
    if isinstance(value, dict):
        return {name: _apart(item, found) for name, item in value.items()}
    return [_apart(item, found) for item in value] if isinstance(value, list) else value


def read_answers(path: Path, comparisons: Sequence[Comparison]) -> tuple[list[Judgement], int]:
    """The answers in an export of either tool, and how many more are in it that do not count.

    Label Studio's JSON and Argilla's `dataset.records.to_json`, see `data.annotations`. A pair may be there several
    times, where its task was imported or exported twice: of each person and pair the last answer holds, as on the page.

    Raises:
        ConfigError: Naming the file, the task and what is wrong with it.
    """
    try:
        rows = json.loads(read_text(path, str(path), "give an export of Label Studio or Argilla"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON ({error}): give an export of Label Studio or Argilla") from None
    reader = _reader(rows, path)
    known, total = {each.id: each for each in comparisons}, 0
    found: dict[Any, tuple[str, Judgement]] = {}
    read: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        # Of people who are not named the same row tells the same answers.
        first = read.setdefault(json.dumps(row, sort_keys=True), number)
        try:
            pair, answers = reader(row)
            if pair not in known:
                raise RecordError("its pair is none of these runs: give the files of runs and --seed of its --export")
            for place, (answer, person, time) in enumerate(answers):
                key, judgement = (pair, person or (first, place)), Judgement(known[pair], answer)
                if key not in found or time >= found[key][0]:
                    found[key] = time, judgement
            total += len(answers)
        except RecordError as error:
            raise ConfigError(f"{path}, task {number}: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, task {number} is not of the form that the tool writes ({error!r})") from None
    return [judgement for _, judgement in found.values()], total - len(found)


# A task -> the id of its comparison, and the answers.
Reader = Callable[[Json], tuple[str, list[Said]]]


def _reader(rows: Any, path: Path) -> Reader:
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        for fields, reader in ((("data", "annotations"), _of_label_studio), (("fields", "responses"), _of_argilla)):
            if all(isinstance(row.get(fields[0]), dict) and fields[1] in row for row in rows):
                return reader
    raise ConfigError(
        f"{path} is no export of Label Studio (tasks with data and annotations: choose JSON, not JSON-MIN) and none of "
        "Argilla (records with fields and responses, of `dataset.records.to_json`)"
    )


def _of_label_studio(task: Json) -> tuple[str, list[Said]]:
    return task["data"].get("pair", ""), label_studio_answers(task)


def _of_argilla(record: Json) -> tuple[str, list[Said]]:
    return str(record.get("id")), argilla_answers(record["responses"])


def _inside(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
