"""Phases of a run: one whose output is in the folder is not repeated, so a stopped run goes on where it was."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experiments.common.storage import load_params, save_params
from sysdpo_jax.io import read_json, write_json
from sysdpo_jax.training import Board, ProgressFactory, Report
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
