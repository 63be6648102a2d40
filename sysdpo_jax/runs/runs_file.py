"""Files of runs: a line each, {"id", "inputs", "outputs"}; images as PNG beside them, sampled texts with tokens."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.images import read_image
from sysdpo_jax.data.files import ImageFiles, as_json, json_lines
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.values import SampledText, from_json, to_json

Run = dict[str, Any]
# How `ImageFiles` names an image. Not by the file of runs: that may be renamed, or joined from those of processes.
IMAGE = re.compile(r"[^/\n]+_images/[^/\n]+\.png")


def as_row(system: CompoundSystem, run: Mapping[str, Any], name: str, images: ImageFiles) -> Run:
    """A run of `rollout` as a line of a file has it. name: its id."""
    outputs = {node.name: as_json(run[node.name], f"{name}-{node.name}", images.beside) for node in system.nodes}
    inputs = {key: as_json(run[key], f"{name}-{key}", images.beside) for key in system.inputs}
    return {"id": name, "inputs": inputs, "outputs": outputs}


def failed_row(system: CompoundSystem, inputs: Mapping[str, Any], name: str, error: Exception) -> Run:
    """A line in the place of a run that a tool left out. name: its id."""
    plain = {key: as_json(inputs[key], "", lambda _, image: repr(type(image))) for key in system.inputs}
    return {"id": name, "inputs": plain, "error": str(error)}


def noted_errors(rows: Iterable[Run]) -> set[tuple[Any, str]]:
    """(id, error) of the lines that say why a run failed.

    A command that is given again adds a line where the error of a run is not among them; the newest line counts.
    """
    return {(row.get("id"), row["error"]) for row in rows if "error" in row}


def run_lines(path: Path) -> Iterator[Run]:
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


def read_lines(path: Path) -> Iterator[Run]:
    """The objects of a file of lines. Raises `ConfigError` naming file and line for what is none."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the file that the command before this one wrote")
    for number, row in json_lines(path):
        if isinstance(row, RecordError):
            raise ConfigError(f"{path}, line {number}: {row}")
        yield row


def values_of(run: Run) -> dict[str, Any]:
    """Inputs and outputs together, as `rollout` returns them and scorers take them."""
    return {**run["inputs"], **run["outputs"]}


def with_images(run: Run, path: Path) -> Run:
    """The run of the file at `path` with arrays for the paths of images, and sampled texts for their objects.

    Raises `ConfigError` naming the run.
    """

    def opened(value: str) -> Any:
        try:
            return np.asarray(read_image(path.parent / value, 0))
        except RecordError as error:
            raise ConfigError(f"{path}, run {run['id']}: {str(error).replace(' in row 0', '')}") from None

    return run | {part: _mapped(opened, from_json(run[part])) for part in ("inputs", "outputs")}


def lacks_images(run: Run, path: Path) -> bool:
    """Whether an image of the run of the file at `path` is not there."""
    found: list[bool] = []

    def looked_for(image: str) -> str:
        found.append((path.parent / image).is_file())
        return image

    _mapped(looked_for, from_json(run))
    return not all(found)


def moved(value: Any, source: Path, target: Path) -> Any:
    """A value of the file `source` with the paths of images as a file at `target` has them."""
    return to_json(_mapped(lambda path: os.path.relpath(source.parent / path, target.parent), from_json(value)))


def _mapped(change: Callable[[str], Any], value: Any) -> Any:
    """The value with what `change` makes of the paths of images in it. What a model wrote is none."""
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_mapped(change, item) for item in value]
    if isinstance(value, SampledText) or not isinstance(value, str):
        return value
    return change(value) if IMAGE.fullmatch(value) else value
