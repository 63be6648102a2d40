"""Files of runs: a line each, {"id", "inputs", "outputs"}, images as PNG beside them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sysdpo_jax as sj
from experiments.own.config import ConfigError
from sysdpo_jax.components.images import read_image
from sysdpo_jax.data.saving import ImageFiles, as_json

Run = dict[str, Any]


def as_row(system: sj.CompoundSystem, run: Mapping[str, Any], name: str, images: ImageFiles) -> Run:
    """A run of `rollout` as a line of a file has it. name: its id."""
    outputs = {node.name: as_json(run[node.name], f"{name}-{node.name}", images.beside) for node in system.nodes}
    inputs = {key: as_json(run[key], f"{name}-{key}", images.beside) for key in system.inputs}
    return {"id": name, "inputs": inputs, "outputs": outputs}


def write_runs(
    path: Path, system: sj.CompoundSystem, runs: Sequence[Mapping[str, Any]], samples: int, scores: Sequence[float]
) -> None:
    """Write the runs of `rollout` with their scores, whole or not at all. samples: runs of a prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = ImageFiles(path)
    rows = [
        as_row(system, run, f"{number // samples}-{number % samples}", images) | {"score": float(score)}
        for number, (run, score) in enumerate(zip(runs, scores, strict=True))
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_runs(path: Path) -> list[Run]:
    """The runs of a file; images are arrays in [0, 1]. Raises `ConfigError` naming file and line."""
    return [_with_images(row, path) for row in read_lines(path)]


def read_lines(path: Path) -> Iterator[Run]:
    """The objects of a file of lines. Raises `ConfigError` naming file and line for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: no object")
            yield row


def append_lines(path: Path, rows: Sequence[Run]) -> None:
    """Add whole lines, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, number: int) -> None:
    """Cut the file after so many lines: what a killed process left of more is made again."""
    lines = path.read_bytes().splitlines(keepends=True)[:number]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(lines))
    partial.replace(path)


def count_lines(path: Path) -> int:
    """The whole lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def values_of(run: Run) -> dict[str, Any]:
    """Inputs and outputs together, as `rollout` returns them and scorers take them."""
    return {**run["inputs"], **run["outputs"]}


def _with_images(row: Run, path: Path) -> Run:
    for part in ("inputs", "outputs"):
        if not isinstance(row.get(part), dict):
            raise ConfigError(f"{path}: the run {row.get('id')!r} has no {part}: give a file of experiments.rollout")
    return row | {part: _opened(row[part], path) for part in ("inputs", "outputs")}


def _opened(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {name: _opened(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_opened(item, path) for item in value]
    if isinstance(value, str) and value.startswith(f"{path.stem}_images/"):
        return np.asarray(read_image(path.parent / value, 0))
    return value
