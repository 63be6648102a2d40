"""Files of prompts and of runs of a system on them.

A run is a line {"id", "inputs", "outputs"}; images are PNG files beside it, and sampled texts keep their tokens. Of one
that a tool left out the line is {"id", "inputs", "error"}.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.images import read_image
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.files import ImageFiles, as_json, json_lines
from sysdpo_jax.data.formats import refuse_unread
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import append_whole, note_of, read_json, read_text, whole_lines, write_json, write_json_lines
from sysdpo_jax.manifest import check_same
from sysdpo_jax.typing import Record
from sysdpo_jax.values import SampledText, from_json, to_json

Line = dict[str, Any]
# (id, run or `ToolError`): an id is "prompt-sample".
Found = Iterable[tuple[str, Any]]
# How `ImageFiles` names an image. Not by the file of runs: that may be renamed, or joined from those of processes.
IMAGE = re.compile(r"[^/\n]+_images/[^/\n]+\.png")


class Outcomes:
    """A file of what became of runs, {"id", ...} or {"id", "error"}, which the same command goes on with.

    What has an error may be tried again, and gets a line for each reason. What a killed process left of a last line is
    cut off; runs whose images are not there are taken out, to be made again.

    Args:
        path: Of the file.
        about: How its lines are made, which stands in `<path>.json` beside it.
        ids_only: `made` has the ids alone, for files that are larger than the memory.

    Attributes:
        made: By id the lines without an error, those of an id as one.
        failed: By id the newest lines with an error of what is not made.

    Raises:
        ConfigError: The file is there and was made in another way: names what differs.
    """

    def __init__(self, path: Path, about: Mapping[str, str], ids_only: bool = False):
        self._path, self._about, self._ids_only, note = path, about, ids_only, note_of(path)
        self.made: dict[str, Line] = {}
        self.failed: dict[str, Line] = {}
        self._noted = set[tuple[str, str]]()
        if not path.exists():
            return
        if not note.exists():
            raise ConfigError(f"{path} exists, and nothing says how it was made: name another output")
        check_same(str(path), read_json(note), about, f"name another output, or give what {note} says")
        os.truncate(path, sum(len(line) for _, line in whole_lines(path)))
        lost = {self._id(line) for line in read_lines(path) if lacks_images(line, path)}
        if lost:
            write_json_lines(path, [line for line in read_lines(path) if line["id"] not in lost])
        self._take(read_lines(path))

    def add(self, lines: Sequence[Line]) -> None:
        """Keep lines, on disk when this returns; an error that is noted is not noted again."""
        new = [line for line in lines if (line["id"], line.get("error")) not in self._noted]
        if new and not self._path.exists():
            write_json(note_of(self._path), self._about)
        if new:
            with self._path.open("ab", buffering=0) as file:
                append_whole(file, "".join(f"{json.dumps(line)}\n" for line in new).encode())
                os.fsync(file.fileno())
        self._take(lines)

    def _take(self, lines: Iterable[Line]) -> None:
        for line in lines:
            name = self._id(line)
            if line.get("error") is None:
                self.made[name] = {} if self._ids_only else self.made.get(name, {}) | line
                self.failed.pop(name, None)
                continue
            self._noted.add((name, line["error"]))
            if name not in self.made:
                self.failed[name] = line

    def _id(self, line: Line) -> str:
        if not isinstance(line.get("id"), str):
            raise ConfigError(f"{self._path} has a line without the field 'id': add it, or name another output")
        return str(line["id"])


def keep_runs(
    kept: Outcomes, system: CompoundSystem, prompts: Sequence[Record], found: Found, images: ImageFiles, where: str = ""
) -> None:
    """Keep what `run_batches` gives.

    where: Stands before the numbers of prompt and sample in errors. Raises the error of a tool that stops the rest,
    once the others are kept.
    """
    lines, stop = list[Line](), None
    for name, run in found:
        if not isinstance(run, ToolError):
            lines.append(as_row(system, run, name, images))
            continue
        prompt, sample = map(int, name.split("-"))
        error = run.at(f"{where}prompt {prompt + 1}, sample {sample + 1}")
        if not error.skip:
            stop = error
            continue
        values = prompts[prompt]
        inputs = {key: as_json(values[key], "", lambda _, image: repr(type(image))) for key in system.inputs}
        lines.append({"id": name, "inputs": inputs, "error": str(error)})
    kept.add(lines)
    if stop is not None:
        raise stop


def as_row(system: CompoundSystem, run: Record, name: str, images: ImageFiles) -> Line:
    """A run of `rollout` as a line of a file has it. name: its id."""
    outputs = {node: as_json(value, f"{name}-{node}", images.beside) for node, value in system.values(run).items()}
    inputs = {key: as_json(run[key], f"{name}-{key}", images.beside) for key in system.inputs}
    return {"id": name, "inputs": inputs, "outputs": outputs}


def read_runs(paths: Iterable[Path]) -> dict[str, tuple[Path, Line]]:
    """{id: (file, run)} of several files as of `run_lines`. Raises `ConfigError` naming a run that is there twice."""
    runs: dict[str, tuple[Path, Line]] = {}
    for path in paths:
        for run in run_lines(path):
            if run["id"] in runs:
                raise ConfigError(f"{path}: the run {run['id']!r} is there twice: give every file of runs once")
            runs[run["id"]] = path, run
    return runs


def run_lines(path: Path) -> Iterator[Line]:
    """The runs of a file one after the other, without those that a tool left out; images are paths, from its folder.

    Raises `ConfigError` naming the file and the line that is no run.
    """
    for number, run in enumerate(read_lines(path), 1):
        if "error" in run and "outputs" not in run:
            continue
        for field, kind, what in (("id", str, "a text"), ("inputs", dict, "an object"), ("outputs", dict, "an object")):
            if not isinstance(run.get(field), kind):
                raise ConfigError(
                    f"{path}, run {number}: the field {field!r} must be {what}: give a file of `sysdpo rollout`"
                )
        yield run


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a file of lines. Raises `ConfigError` naming file and line for what is none."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the file that the command before this one wrote")
    for number, row in json_lines(path):
        if isinstance(row, RecordError):
            raise ConfigError(f"{path}, line {number}: {row}")
        yield row


def values_of(run: Line) -> dict[str, Any]:
    """Inputs and outputs together, as `rollout` returns them and scorers take them."""
    return {**run["inputs"], **run["outputs"]}


def with_images(run: Line, path: Path) -> Line:
    """The run of the file at `path` with arrays for the paths of images, and sampled texts for their objects.

    Raises `ConfigError` naming the run.
    """

    def opened(value: str) -> Any:
        try:
            return np.asarray(read_image(path.parent / value, 0))
        except RecordError as error:
            raise ConfigError(f"{path}, run {run['id']}: {str(error).replace(' in row 0', '')}") from None

    return run | {part: map_images(opened, from_json(run[part])) for part in ("inputs", "outputs")}


def lacks_images(run: Line, path: Path) -> bool:
    """Whether an image of the run of the file at `path` is not there."""
    found: list[bool] = []

    def looked_for(image: str) -> str:
        found.append((path.parent / image).is_file())
        return image

    map_images(looked_for, from_json(run))
    return not all(found)


def moved(value: Any, source: Path, target: Path) -> Any:
    """A value of the file `source` with the paths of images as a file at `target` has them."""
    return to_json(map_images(lambda path: os.path.relpath(source.parent / path, target.parent), from_json(value)))


def map_images(change: Callable[[str], Any], value: Any) -> Any:
    """The value with what `change` makes of the paths of images in it. What a model wrote is none."""
    if isinstance(value, dict):
        return {name: map_images(change, item) for name, item in value.items()}
    if isinstance(value, list):
        return [map_images(change, item) for item in value]
    if isinstance(value, SampledText) or not isinstance(value, str):
        return value
    return change(value) if IMAGE.fullmatch(value) else value


def read_prompts(path: str | Path, system: CompoundSystem, ignore: Sequence[str] = ()) -> list[dict[str, Any]]:
    """JSON Lines of objects with the system's inputs or, for a system with one input, a .txt file with a prompt a line.

    ignore: fields that are left unread; any other that is no input and holds something is an error.
    Raises `ConfigError` naming file, line and field.
    """
    path = Path(path)
    if path.suffix == ".txt":
        if len(system.inputs) != 1:
            raise ConfigError(
                f"{path}: the system has the inputs {', '.join(system.inputs)}: write JSON Lines with them"
            )
        # Not splitlines: a prompt may hold what that takes for ends of lines.
        texts = [line.strip() for line in read_text(path, str(path), "give a file of prompts").split("\n")]
        rows = [{system.inputs[0]: text} for text in texts if text]
    else:
        rows = list(read_lines(path))
    if not rows:
        raise ConfigError(f"{path} holds no prompt")
    for number, row in enumerate(rows, 1):
        for name in system.inputs:
            if name not in row:
                raise ConfigError(f"{path}, prompt {number} lacks the input {name!r}: add the field")
        try:
            refuse_unread(row, system.inputs, ignore)
        except RecordError as error:
            raise ConfigError(f"{path}, prompt {number}: {error}") from None
    return [{name: from_json(row[name]) for name in system.inputs} for row in rows]
