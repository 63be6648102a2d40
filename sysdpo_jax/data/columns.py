"""Columns of values on disk: strings, numbers and equally shaped arrays, in a file that cannot hold code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


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
    np.savez_compressed(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def load_columns(path: Path) -> dict[str, np.ndarray]:
    """Undo `save_columns`."""
    with np.load(path, allow_pickle=False) as columns:
        return dict(columns)


def as_values(column: np.ndarray) -> list[Any]:
    """A column's values: plain strings and numbers (or lists of strings), else arrays."""
    return column.tolist() if column.dtype.kind == "U" or column.ndim == 1 else list(column)
