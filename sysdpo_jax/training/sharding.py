"""Where arrays live: one mesh for the whole system, and rules from parameter paths to partition specs.

Mesh axes: data (copies of the parameters), fsdp (parameters cut over devices), tensor (cut by the rules of a model).
A batch is cut over data x fsdp. Paths are "/"-joined, `params_key/module/.../leaf`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# Leaves with fewer elements stay whole on every device: gathering them costs more than their memory.
MIN_SHARDED_SIZE = 2**16

Rules = Sequence[tuple[str, PartitionSpec]]


class ShardingError(ValueError):
    """An array cannot be placed on the mesh: the message names its path, its shape and the remedy."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices. Raises `ShardingError` when there are fewer."""
    needed, devices = data * fsdp * tensor, jax.devices()
    if needed > len(devices):
        raise ShardingError(f"a mesh of {data} x {fsdp} x {tensor} needs {needed} devices, there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as text: dict keys, attribute names and indices joined by "/"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """`{path: leaf}` of the leaves, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def tree_shardings(mesh: Mesh, tree: PyTree, rules: Rules = ()) -> PyTree:
    """A `NamedSharding` for each leaf of `tree` (anything with a shape).

    rules: (regex, spec) pairs; the first whose regex is found in the leaf's path decides. A leaf that no rule names is
    cut over fsdp along its largest divisible axis when it has at least `MIN_SHARDED_SIZE` elements, else kept whole.
    Raises `ShardingError` for a rule that does not fit the leaf.
    """

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name, shape = path_name(path), tuple(np.shape(leaf))
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check_spec(mesh, name, shape, pattern, spec)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _default_spec(mesh, shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def like_params(mesh: Mesh, tree: PyTree, params: Mapping[str, Any]) -> PyTree:
    """Shardings for a tree whose leaves mirror parameters, such as an optimiser state `{params_key: state}`.

    params: `{path: array}`, placed. A leaf that ends in a parameter's path below the same key and has its shape (a
    moment) is placed as that parameter; any other (a count, a factored moment) by the default rule.
    """

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        key, *parts = path_name(path).split("/")
        shape = tuple(np.shape(leaf))
        for start in range(len(parts)):
            twin = params.get("/".join([key, *parts[start:]]))
            if twin is not None and twin.shape == shape:
                return twin.sharding
        return NamedSharding(mesh, _default_spec(mesh, shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """The batch cut along its leading axis over data x fsdp; every process passes the whole batch.

    Raises `ShardingError` naming the first leaf whose leading axis cannot be cut evenly.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, leaf in by_path(batch).items():
        shape = np.shape(leaf)
        if not shape or shape[0] % parts:
            raise ShardingError(
                f"batch leaf {name!r} of shape {list(shape)} must have a multiple of {parts} rows (data x fsdp)"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: x[index]), batch)


def _default_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divisible or math.prod(shape) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    axis = max(divisible, key=lambda a: shape[a])
    return PartitionSpec(*(None,) * axis, "fsdp")


def _check_spec(mesh: Mesh, name: str, shape: tuple[int, ...], pattern: str, spec: PartitionSpec) -> None:
    if len(spec) > len(shape):
        raise ShardingError(
            f"rule {pattern!r} gives {len(spec)} axes to {name!r} of shape {list(shape)}: narrow the rule"
        )
    for axis, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        unknown = [axis_name for axis_name in names if axis_name not in mesh.shape]
        if unknown:
            raise ShardingError(f"rule {pattern!r} names the mesh axis {unknown[0]!r}: the axes are {', '.join(AXES)}")
        parts = math.prod(mesh.shape[axis_name] for axis_name in names)
        if shape[axis] % parts:
            raise ShardingError(
                f"rule {pattern!r} cuts axis {axis} of {name!r} (shape {list(shape)}) into {parts} parts, which "
                "does not divide it: choose another axis or mesh"
            )
