"""Run by test_attention.py: attention in blocks on a mesh of 8 virtual devices, against plain attention without one."""

import json
import os
import re
from functools import partial

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sysdpo_jax.models import attention, blocks
from sysdpo_jax.models.attention import attend

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"))
attention.BLOCK = blocks.BLOCK = 500


def gradient(onto: jax.Array, visible: jax.Array, *args: jax.Array, implementation: str) -> tuple[jax.Array, ...]:
    out, back = jax.vjp(lambda *x: attend(*x, visible, causal=True, implementation=implementation), *args)
    return out, *back(onto)


mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
keys = jax.random.split(jax.random.key(0), 5)
args = [jax.random.normal(key, (8, 20, heads, 4)) for key, heads in zip(keys, (4, 4, 2, 2), strict=False)]
visible = jax.random.bernoulli(keys[4], 0.7, (8, 20, 20))
inputs = args[0], visible, *args[1:]
wanted = jax.jit(partial(gradient, implementation="plain"))(*inputs)
places = (NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),) * 5
with jax.sharding.set_mesh(mesh), nn.logical_axis_rules(RULES):
    compiled = jax.jit(partial(gradient, implementation="auto"), in_shardings=places).lower(*inputs).compile()
found = compiled(*jax.device_put(inputs, places))
error = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(found, wanted, strict=True))
text = compiled.as_text()
alone = jax.jit(partial(gradient, implementation="auto")).lower(*inputs).as_text()
loops = {"mesh": text.count(" while("), "no mesh": alone.count("stablehlo.while")}
# The rows stay where they are; heads are gathered at the end at most, as inputs come whole and outputs are free.
rows = [int(x) for x in re.findall(r"all-gather\S* = f32\[(\d+)", text)]
print(json.dumps({"error": error, "loops": loops, "rows": rows}))
