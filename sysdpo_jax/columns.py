"""Columns of values on disk: texts, numbers and equally shaped arrays, in a file that cannot hold code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.io import replacing
from sysdpo_jax.values import SampledText, from_json, to_json

# numpy's own arguments are names too. Columns of sampled texts, or of lists of them, are texts in JSON.
COLUMN, SAMPLED = "column ", "sampled "


def save_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Write {name: column} as compressed NPZ, whole or not at all.

    Raises `ValueError` naming a column whose values are no array of strings or numbers.
    """
    arrays = {}
    for name, column in columns.items():
        if any(map(_is_sampled, column)):
            arrays[f"{SAMPLED}{name}"] = np.array([json.dumps(to_json(value)) for value in column])
            continue
        try:
            array = arrays[f"{COLUMN}{name}"] = np.asarray(column)
        except ValueError as error:
            raise ValueError(f"the values of {name!r} are not equally shaped, so {path} cannot hold them") from error
        if array.dtype.kind == "O":
            kinds = sorted({type(value).__name__ for value in column})
            raise ValueError(f"the values of {name!r} are of type {', '.join(kinds)}, so {path} cannot hold them")
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
        file.flush()
        # A checkpoint may count on it.
        os.fsync(file.fileno())


def load_columns(path: Path) -> dict[str, np.ndarray]:
    """Undo `save_columns`."""
    with np.load(path, allow_pickle=False) as columns:
        return dict(_loaded(name, column) for name, column in columns.items())


def _loaded(name: str, column: np.ndarray) -> tuple[str, np.ndarray]:
    if not name.startswith(SAMPLED):
        return name.removeprefix(COLUMN), column
    values = np.empty(len(column), object)
    values[:] = [from_json(json.loads(text)) for text in column]
    return name.removeprefix(SAMPLED), values


def _is_sampled(value: Any) -> bool:
    return isinstance(value, SampledText) or (isinstance(value, list) and any(map(_is_sampled, value)))


def as_values(column: np.ndarray) -> list[Any]:
    """A column's values as they were: strings, numbers and lists of strings or integers, else arrays."""
    return column.tolist() if column.dtype.kind in "Uib" or column.ndim == 1 else list(column)
