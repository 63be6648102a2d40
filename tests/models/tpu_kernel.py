"""Run by test_attention.py: a decoder's gradient with the splash kernel, compiled for TPUs on a machine without any."""

import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sysdpo_jax.models.decoder import Decoder, DecoderConfig

LENGTH = 1024
CONFIG = DecoderConfig(256, 512, 512, 2, 4, 2, head_dim=128, remat="full", dtype="bfloat16", attention="flash")
RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"))


def compile_gradient(mesh: Mesh, config: DecoderConfig) -> dict[str, int]:
    """What the program of two sides' gradient holds."""
    model = Decoder(config)

    def loss(params, tokens):
        hidden = jax.vmap(lambda side: model.apply(params, side, method="hidden_states"))(tokens)
        return jnp.sum(hidden.astype(jnp.float32) ** 2)

    def on(shape, *axes):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.tree.map(on, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    tokens = on(jax.ShapeDtypeStruct((2, 8, LENGTH), jnp.int32), None, ("data", "fsdp"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    # Of one side's rows on one device: 1 row, 2 of the 4 heads.
    scores = sum(f"[{batch},2,{LENGTH},{LENGTH}]" in text for batch in ("1", "2", "2,1", "1,2"))
    return {"kernels": text.count("tpu_custom_call"), "gathers": text.count(" all-gather("), "scores": scores}


devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(devices).reshape(2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
print(json.dumps(compile_gradient(mesh, CONFIG)))
