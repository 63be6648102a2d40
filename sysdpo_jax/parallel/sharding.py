"""Where arrays live: one mesh for the whole system, and rules from parameter paths to partition specs.

Mesh axes: data (copies of the parameters), fsdp (parameters cut over devices, gathered layer by layer), tensor (heads
and hidden widths cut over devices, which each compute their part). A batch is cut over data x fsdp.
Paths are "/"-joined, `params_key/module/.../leaf`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from sysdpo_jax.models.partitioning import logical_axes, num_parts
from sysdpo_jax.trees import by_path, path_name

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# Where the logical axes of models/partitioning.py lie; those not named here are never cut.
LOGICAL_RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("channels", "tensor"),
    ("vocab", "tensor"),
)

# Leaves with fewer elements that no table cuts stay whole on every device. Small enough that the whole ones are less
# than a thousandth of what a device holds of any model family on 8 devices.
MIN_SHARDED_SIZE = 2**9

Rules = Sequence[tuple[str, PartitionSpec]]
# Of devices, or of sizes alone.
AnyMesh: TypeAlias = Mesh | AbstractMesh


class ShardingError(ValueError):
    """An array cannot be placed on the mesh: the message names its path, its shape and the remedy."""


def make_mesh(data: int = 1, fsdp: int | None = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices.

    Devices of several slices (of TPUs; JAX takes a host of GPUs for one) lie slice by slice, so that data, and what is
    left of fsdp, span them.

    Args:
        data: Copies of the parameters, which share a batch.
        fsdp: Parts that parameters and batch are cut into; None takes all that data and tensor leave.
        tensor: Parts that the layers' widths are cut into.
        devices: jax.devices() by default, or those of a topology to compile for.

    Returns:
        The mesh, with the axes `AXES`.

    Raises:
        ShardingError: When there are fewer devices, when data and tensor do not divide them, and where tensor would
            span slices.
    """
    devices = jax.devices() if devices is None else devices
    if min(data, tensor, 1 if fsdp is None else fsdp) < 1:
        raise ShardingError(f"a mesh of {data} x {fsdp} x {tensor}: sizes are 1 or more")
    if fsdp is None:
        fsdp, rest = divmod(len(devices), data * tensor)
        if rest:
            raise ShardingError(f"data {data} x tensor {tensor} does not divide the {len(devices)} devices: change one")
    needed = data * fsdp * tensor
    if needed > len(devices):
        raise ShardingError(f"a mesh of {data} x {fsdp} x {tensor} needs {needed} devices, there are {len(devices)}")
    devices, shape, types = devices[:needed], (data, fsdp, tensor), (AxisType.Auto,) * 3
    slices = Counter(_slice_of(device) for device in devices)
    if len(slices) == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if any(count % tensor for count in slices.values()):
        raise ShardingError(f"tensor {tensor} would span slices of {min(slices.values())} devices: choose a divisor")
    # jax.make_mesh refuses several slices.
    ordered = np.array(sorted(devices, key=lambda device: (_slice_of(device), device.id)), object)
    return Mesh(ordered.reshape(shape), AXES, axis_types=types)


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: AnyMesh, tree: PyTree, rules: Rules = ()) -> PyTree:
    """How arrays are cut over a mesh.

    A leaf that no rule names has the logical axes of the model families' tables (`models.partitioning`), of which those
    are cut that the mesh divides. A leaf of at least `MIN_SHARDED_SIZE` elements that fsdp does not cut by then, of a
    model in no table or of an odd width, is cut over fsdp along its largest divisible axis; a smaller one stays whole.

    Args:
        mesh: From `make_mesh`.
        tree: Anything with a shape.
        rules: (regex, spec) pairs; the first whose regex is found in the leaf's path decides.

    Returns:
        A `NamedSharding` for each leaf.

    Raises:
        ShardingError: For a rule that does not fit the leaf and for a mesh of other axes than `AXES`.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ShardingError(f"the mesh has the axes {mesh.axis_names}, not {AXES}: make it with make_mesh")

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name, shape = path_name(path), tuple(np.shape(leaf))
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check_spec(mesh, name, shape, pattern, spec)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _spec(mesh, shape, logical_axes(name)))

    return jax.tree_util.tree_map_with_path(place, tree)


@contextmanager
def activation_rules(mesh: AnyMesh) -> Iterator[None]:
    """Trace a function of this mesh in it: the models' activations are then placed by their logical axes."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(LOGICAL_RULES):
        yield


def like_params(mesh: Mesh, tree: PyTree, params: Mapping[str, Any]) -> PyTree:
    """Shardings for a tree whose leaves mirror parameters, such as an optimiser's state.

    params: `{path: array}`, placed. A leaf whose path ends in that of a parameter and that has its shape (a moment) is
    placed as that parameter; any other (a count, a factored moment) by the default rule.
    """

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        shape = tuple(np.shape(leaf))
        for start in range(len(parts)):
            twin = params.get("/".join(parts[start:]))
            if twin is not None and twin.shape == shape:
                return twin.sharding
        return NamedSharding(mesh, _spec(mesh, shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_parts(mesh: AnyMesh) -> int:
    """Into how many parts a mesh cuts the rows of a batch.

    Args:
        mesh: From `make_mesh`.

    Returns:
        data x fsdp.
    """
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a batch this process gives to `place_batch`.

    Processes that hold the same rows, as when tensor spans them, have the same index. Where the devices of a process
    are no neighbours along the batch, its block lies in pieces: the same rows as in one process, in another order.

    Args:
        mesh: Of the run.

    Returns:
        (index, count): the index-th of count equal blocks.

    Raises:
        ShardingError: For a mesh that gives two processes some rows in common, or this one none.
    """
    parts, held = batch_parts(mesh), dict[int, set[int]]()
    places: Mapping[Any, Any] = NamedSharding(mesh, BATCH_SPEC).devices_indices_map((parts,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    shards = sorted({tuple(sorted(places)) for places in held.values()})
    if jax.process_index() not in held:
        raise ShardingError(f"process {jax.process_index()} has no device on the mesh: use all devices, or end it")
    if len({len(places) for places in shards}) > 1 or sum(map(len, shards)) != parts:
        raise ShardingError(
            f"the {parts} parts of a batch (data x fsdp) fall on the processes as {shards}, which are not disjoint and "
            "of one size: choose data x fsdp a multiple of the processes, or a divisor of their number"
        )
    return shards.index(tuple(sorted(held[jax.process_index()]))), len(shards)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """The batch cut along its leading axis over data x fsdp; every process passes its own rows, see `batch_shard`.

    Raises `ShardingError` naming the first leaf whose leading axis cannot be cut evenly or is not the others'.
    """
    sharding, (_, count) = NamedSharding(mesh, BATCH_SPEC), batch_shard(mesh)
    parts, rows = batch_parts(mesh) // count, None
    for name, leaf in by_path(batch).items():
        shape = np.shape(leaf)
        if not shape or shape[0] % parts:
            whose = "data x fsdp" if count == 1 else f"data x fsdp / {count} blocks: pass this process's rows only"
            raise ShardingError(
                f"batch leaf {name!r} of shape {list(shape)} must have a multiple of {parts} rows ({whose})"
            )
        rows = shape[0] if rows is None else rows
        if shape[0] != rows:
            raise ShardingError(
                f"batch leaf {name!r} of shape {list(shape)} does not have the {rows} rows of those before it: give "
                "all leaves the same rows"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (len(x) * count, *np.shape(x)[1:])), batch
    )


def _spec(mesh: AnyMesh, shape: tuple[int, ...], logical: Sequence[str | None] | None = None) -> PartitionSpec:
    """logical: of the last axes of a leaf that a table knows, before which stand stacked layers and windows."""
    if logical is None or len(logical) > len(shape):
        logical = (None,) * len(shape)
    rules: dict[str | None, Any] = dict(LOGICAL_RULES)
    first, fsdp = len(shape) - len(logical), mesh.shape["fsdp"]
    spec: list[Any] = [None] * first
    for name, size in zip(logical, shape[first:], strict=True):
        parts = num_parts(mesh.shape, rules.get(name))
        spec.append(rules[name] if parts > 1 and size % parts == 0 else None)
    if "fsdp" not in spec and fsdp > 1 and math.prod(shape) >= MIN_SHARDED_SIZE:
        free = [axis for axis in range(first, len(shape)) if spec[axis] is None and shape[axis] % fsdp == 0]
        if free:
            spec[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _check_spec(mesh: AnyMesh, name: str, shape: tuple[int, ...], pattern: str, spec: PartitionSpec) -> None:
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


def replicate_per_process(params: PyTree) -> PyTree:
    """The same numbers where this process alone can compute with them; in one process `params` as they are.

    Of arrays that lie on several processes each process gets the whole, cut over its own devices of the mesh as their
    mesh cuts them, as far as these suffice; all processes must call this, at the same point of the program. Arrays that
    lie on this process's devices already stay as they are.
    While the result is in use, the devices of each process hold these arrays a second time, whole between them. It may
    share buffers with `params`: use it before these are donated to a step.

    Args:
        params: Any tree of arrays.

    Returns:
        The tree on this process's devices.

    Raises:
        ShardingError: Where the processes have different numbers of devices on the mesh.
    """
    spread = [leaf for leaf in jax.tree.leaves(params) if _is_spread(leaf)]
    if not spread:
        return params
    every = _by_process(spread[0].sharding.mesh)
    own = [process for process in every.devices if process.flat[0].process_index == jax.process_index()]
    shardings = tree_shardings(Mesh(own[0], AXES, axis_types=(AxisType.Auto,) * 3), params)
    return jax.tree.map(lambda leaf, here: _moved(leaf, every, here) if _is_spread(leaf) else leaf, params, shardings)


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _by_process(mesh: Mesh) -> Mesh:
    """The devices of the mesh with the processes as first axis, before the axes that cut what each of them has."""
    groups: dict[int, list[Any]] = {}
    for device in mesh.devices.flat:
        groups.setdefault(device.process_index, []).append(device)
    sizes = {process: len(devices) for process, devices in sorted(groups.items())}
    number = min(sizes.values())
    if max(sizes.values()) > number:
        raise ShardingError(f"the processes have {sizes} devices on the mesh: give each as many, to sample on each")
    tensor = math.gcd(mesh.shape["tensor"], number)
    fsdp = math.gcd(mesh.shape["fsdp"], number // tensor)
    shape = (len(groups), number // (fsdp * tensor), fsdp, tensor)
    devices = np.array([groups[process] for process in sizes], object).reshape(shape)
    return Mesh(devices, ("process", *AXES), axis_types=(AxisType.Auto,) * 4)


def _moved(leaf: Array, every: Mesh, here: NamedSharding) -> Array:
    if leaf.is_fully_replicated:
        parts, here = leaf, NamedSharding(here.mesh, PartitionSpec())
    else:
        # One at a time: programs with collectives that do not wait for each other hang on CPUs of several processes.
        parts = jax.block_until_ready(jax.device_put(leaf, NamedSharding(every, here.spec)))
    return jax.make_array_from_single_device_arrays(leaf.shape, here, [part.data for part in parts.addressable_shards])
