"""Columns of values on disk: strings, numbers and equally shaped arrays, in a file that cannot hold code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# numpy's own arguments are names too.
PREFIX = "column "


def save_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Write {name: column} as compressed NPZ, whole or not at all.

    Raises `ValueError` naming a column whose values are no array of strings or numbers.
    """
    arrays = {}
    for name, column in columns.items():
        try:
            arrays[name] = np.asarray(column)
        except ValueError as error:
            raise ValueError(f"the values of {name!r} are not equally shaped, so {path} cannot hold them") from error
        if arrays[name].dtype.kind == "O":
            kinds = sorted({type(value).__name__ for value in column})
            raise ValueError(f"the values of {name!r} are of type {', '.join(kinds)}, so {path} cannot hold them")
    partial = path.with_suffix(".partial.npz")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{f"{PREFIX}{name}": array for name, array in arrays.items()})
        file.flush()
        # A checkpoint may count on it.
        os.fsync(file.fileno())
    partial.replace(path)


def load_columns(path: Path) -> dict[str, np.ndarray]:
    """Undo `save_columns`."""
    with np.load(path, allow_pickle=False) as columns:
        return {name.removeprefix(PREFIX): column for name, column in columns.items()}


def as_values(column: np.ndarray) -> list[Any]:
    """A column's values as they were: strings, numbers and lists of strings or integers, else arrays."""
    return column.tolist() if column.dtype.kind in "Uib" or column.ndim == 1 else list(column)
