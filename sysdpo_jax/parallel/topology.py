"""TPU topologies that are not there, for compiling ahead of time, and the memory of their chips."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.parallel.sharding import ShardingError, make_mesh

# GiB of HBM that the compiler lets a program use on one chip, as its refusals state them ("exceeds available HBM
# (15.75G)"); the rest of the chip's 32, 16, 95 and 32 GB it keeps.
USABLE_HBM_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
# A v4 chip counts as one device only in the mode that joins its two cores; in the others it always does.
SETTINGS = {"v4": {"chip_config_name": "megacore"}}
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
INSTALL = 'pip install "sysdpo_jax[tpu-aot]"'


def topology(name: str) -> list[Any]:
    """The chips of a topology such as "v5e:4x4" or "v5p:2x2x2", as JAX devices that can only be compiled for.

    Raises `ConfigError` for a name that it does not know and where libtpu, which compiles, is not installed.
    """
    generation, _, sides = name.partition(":")
    if generation not in USABLE_HBM_GIB or not re.fullmatch(r"\d+(x\d+)+", sides):
        raise ConfigError(
            f"unknown topology {name!r}: give a generation ({', '.join(USABLE_HBM_GIB)}) and its sides, such as "
            "v5e:4x4, v6e:2x4, v4:2x2x2 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for TPUs needs the package libtpu: {INSTALL}")
    # There is no TPU here to ask about, and nothing is opened that another process could not have as well.
    for setting, value in LIBTPU.items():
        os.environ.setdefault(setting, value)
    # Importing it loads libtpu.
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(name, "tpu", **SETTINGS.get(generation, {})).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu knows no topology {name!r}: {error}") from error
    chips = math.prod(int(side) for side in sides.split("x"))
    if len(devices) != chips:
        raise ConfigError(f"{name} has {len(devices)} devices for {chips} chips: memory a chip cannot be told")
    return devices


def topology_mesh(name: str, data: int, fsdp: int | None, tensor: int) -> Mesh:
    """A mesh of all chips of a topology that need not be there.

    Args:
        name: Of the topology, such as "v5e:4x4".
        data: As for `make_mesh`.
        fsdp: As for `make_mesh`.
        tensor: As for `make_mesh`.

    Returns:
        The mesh.

    Raises:
        ConfigError: As `topology`, and for sizes of another number.
    """
    devices = topology(name)
    try:
        mesh = make_mesh(data, fsdp, tensor, devices)
    except ShardingError as error:
        raise ConfigError(f"{name}: {error}") from error
    if mesh.size != len(devices):
        raise ConfigError(f"{name}: data x fsdp x tensor is {mesh.size} of {len(devices)} chips: take all")
    return mesh
