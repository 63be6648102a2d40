"""Pytrees by the paths of their leaves."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as text: dict keys, attribute names and indices joined by "/"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """`{path: leaf}` of the leaves, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
