"""Run by test_cudnn.py: attention on a mesh of 8 virtual devices, lowered for CUDA."""

import json
import os
import re

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as kernel
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sysdpo_jax.models import cudnn
from sysdpo_jax.models.attention import attend

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"))


def operands(groups: int) -> list[str]:
    """Shapes of queries and keys in the call of the forward kernel."""

    def shape(length: int, heads: int) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.ShapeDtypeStruct((8, length, heads, 64), jnp.bfloat16, sharding=place)

    def gradient(queries, keys, values):
        return jax.vjp(lambda *args: attend(*args, implementation="cudnn"), queries, keys, values)[1](queries)

    with jax.sharding.set_mesh(mesh), nn.logical_axis_rules(RULES):
        traced = jax.jit(gradient).trace(shape(64, 4), shape(77, groups), shape(77, groups))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" not in text
    [call] = re.findall(r"__cudnn\$fmhaSoftmax\(.*?: \((.*?)\) ->", text)
    return re.findall(r"tensor<([\dx]+)xbf16>", call)[:2]


kernel.check_cudnn_version = lambda: 91000
cudnn._is_there = lambda: True
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
print(json.dumps({"2 groups": operands(2), "1 group": operands(1)}))
