"""Run by test_tensors.py in a process with 8 CPU devices: what is read for each of them."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import load_params
from sysdpo_jax.pretrained.tensors import Safetensors


class Recorder(Safetensors):
    """Keeps the size of every block that is read."""

    sizes: dict[str, set[int]] = {}

    def read(self, name, index):
        block = super().read(name, index)
        self.sizes.setdefault(name, set()).add(block.size)
        return block


mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
abstract = {"wide": {"kernel": jax.ShapeDtypeStruct((4, 16), "float32")}, "tall": jax.ShapeDtypeStruct((8,), "float32")}
specs = {"wide": {"kernel": jax.P(None, "fsdp")}, "tall": jax.P("fsdp")}
source = Recorder(Path(sys.argv[1]), "model")
params = load_params(
    abstract, source, Naming(), shardings=lambda tree: jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)
)
assert Recorder.sizes == {"wide.weight": {8}, "tall": {1}}, Recorder.sizes
assert params["wide"]["kernel"].sharding.shard_shape((4, 16)) == (4, 2)
np.testing.assert_array_equal(params["wide"]["kernel"], np.arange(64.0).reshape(16, 4).T)
np.testing.assert_array_equal(params["tall"], np.arange(8.0))
