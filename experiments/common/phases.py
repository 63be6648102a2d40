"""Phases of a run: one whose output is in the folder is not repeated, so a stopped run goes on where it was.

Their outputs are parameters and pairs of runs, in files that cannot hold code.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from sysdpo_jax import PreferenceRecord
from sysdpo_jax.io import read_json, replacing, write_json
from sysdpo_jax.row_files import ROWS, RowFile, write_row_file
from sysdpo_jax.training import Board, ProgressFactory, Report
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params

T = TypeVar("T")


class Phases:
    """The phases of one seed, in a folder of its own. label: in front of their names on the board."""

    def __init__(self, folder: Path, label: str, board: Board):
        self.folder, self._label, self._board = folder, label, board
        self._times = folder / "seconds.json"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: seconds it took}, phases of earlier starts included."""
        return read_json(self._times) if self._times.exists() else {}

    def progress(self, name: str) -> ProgressFactory:
        """Bars of a phase that counts its own steps, as `Trainer` does."""
        return lambda start, steps: self._board.phase(f"{self._label} {name}", start, steps)

    def run(
        self,
        name: str,
        path: Path,
        steps: int | None,
        make: Callable[[Report], T],
        load: Callable[[Path], T],
        save: Callable[[Path, T], None],
    ) -> T:
        """The phase's output, made unless the file exists. steps: of its bar, None when `make` shows its own."""
        if not path.exists():
            began = time.monotonic()
            if steps is None:
                value = make(lambda done, note: None)
            else:
                with self.progress(name)(0, steps) as report:
                    value = make(report)
            save(path, value)
            write_json(self._times, self.seconds | {name: round(time.monotonic() - began, 2)})
        # What is used is what is on disk, so that a resumed run uses the same.
        return load(path)

    def params(self, name: str, steps: int | None, make: Callable[[Report], Params]) -> Params:
        """A phase whose output are parameters."""
        return self.run(name, self.folder / f"{name}.safetensors", steps, make, load_params, save_params)


def save_params(path: Path, params: Params) -> None:
    """Nested dicts of arrays as safetensors, under "/"-joined names."""
    with replacing(path) as partial:
        save_file({name: np.asarray(leaf) for name, leaf in by_path(params).items()}, partial)


def load_params(path: Path) -> Params:
    """Undo `save_params`."""
    tree: dict[str, Any] = {}
    for name, leaf in load_file(path).items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = jax.numpy.asarray(leaf)
    return tree


def overlay(params: Params, changed: Params) -> Params:
    """The parameters with the leaves of `changed`, which may lack some, in their places.

    Raises `ValueError` for a leaf that the parameters do not have.
    """
    if not isinstance(params, Mapping):
        return changed
    unknown = sorted(changed.keys() - params.keys())
    if unknown:
        raise ValueError(
            f"the stored parameters {', '.join(unknown)} are not among the model's: other code made them; choose "
            "another --folder"
        )
    return {name: overlay(leaf, changed[name]) if name in changed else leaf for name, leaf in params.items()}


def save_pairs(path: Path, pairs: Sequence[PreferenceRecord]) -> None:
    """Pairs of any values, in two files of which the one at `path`, which ends with `ROWS`, is the last one written."""
    write_row_file(path.with_name(path.name.removesuffix(ROWS)), ([p.inputs, p.chosen, p.rejected] for p in pairs))


def load_pairs(path: Path) -> list[PreferenceRecord]:
    """Undo `save_pairs`."""
    return [PreferenceRecord(*row) for row in RowFile(path.with_name(path.name.removesuffix(ROWS)))]
