"""Parameters of a mesh over several processes, whole on the devices of each: to sample at one's own pace."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from sysdpo_jax.parallel.sharding import AXES, ShardingError, tree_shardings


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
