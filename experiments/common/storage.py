"""What the phases of a run leave on disk: parameters, and runs of the system. No file can hold code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from sysdpo_jax import PreferenceRecord
from sysdpo_jax.io import replacing
from sysdpo_jax.row_files import ROWS, RowFile, write_row_file
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params


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
