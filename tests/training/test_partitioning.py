"""Every parameter of the model families is cut by its family's table; nothing runs: meshes and arrays are abstract."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from experiments.scaling.systems import DECODERS, UNETS
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.models.lora import LoRA, add_lora
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.partitioning import constrain, logical_axes
from sysdpo_jax.models.t5 import T5Config, T5Encoder
from sysdpo_jax.models.unet import UNet2DCondition
from sysdpo_jax.parallel.sharding import AXES, ShardingError, activation_rules, make_mesh, tree_shardings
from sysdpo_jax.trees import by_path

# Fewer of the layers that are not stacked: one is like another.
TOKENS = ((1, 8), jnp.int32)
IMAGE, TIME = ((1, 16, 16, 4), jnp.float32), ((1,), jnp.float32)
FAMILIES = {
    "decoder, tied": (Decoder(DECODERS["smollm2-135m"]), TOKENS),
    "decoder, 8B": (Decoder(DECODERS["llama-3-8b"]), TOKENS),
    "clip": (CLIPTextEncoder(CLIPTextConfig(num_hidden_layers=2)), TOKENS),
    "t5": (T5Encoder(T5Config(num_layers=2)), TOKENS),
    "unet, SDXL": (
        UNet2DCondition(UNETS["sdxl"]),
        IMAGE,
        TIME,
        *(((1, *shape), jnp.float32) for shape in ((7, 2048), (1280,), (6,))),
    ),
    "mmdit": (
        MMDiT(MMDiTConfig(num_layers=2)),
        ((1, 16, 16, 16), jnp.float32),
        TIME,
        *(((1, *shape), jnp.float32) for shape in ((7, 4096), (2048,))),
    ),
}


def mesh(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def abstract(name):
    module, *inputs = FAMILIES[name]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    return {"model": jax.eval_shape(module.init, jax.random.key(0), *arrays)["params"]}


def elements(shapes):
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_fsdp_leaves_a_device_an_eighth(name):
    """At most 1.001 of an eighth: what stays whole must not add up."""
    tree = abstract(name)
    shardings = tree_shardings(mesh(fsdp=8), tree)
    part = elements(s.shard_shape(x.shape) for x, s in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True))
    assert part <= 1.001 * elements(x.shape for x in jax.tree.leaves(tree)) / 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_large_parameter_is_in_a_table(name):
    """The fixed table of positions of an MMDiT is no layer's and goes by the default rule."""
    large = {path for path, leaf in by_path(abstract(name)).items() if leaf.size >= 2**14}
    assert large
    assert [path for path in large if logical_axes(path) is None and not path.endswith("pos_embed/pos_embed")] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_layers_and_windows_stay_whole(name):
    """Three parts fit a window of 3 x 3 and 30 layers, but not most widths."""
    leaves = by_path(abstract(name))
    for path, sharding in by_path(tree_shardings(mesh(fsdp=3), abstract(name))).items():
        leading = 1 if "/layers/" in path or "/transformer_blocks/" in path else max(0, leaves[path].ndim - 2)
        assert not any(sharding.spec[:leading]), path


def test_heads_and_hidden_widths_are_cut_over_tensor():
    specs = {p: s.spec for p, s in by_path(tree_shardings(mesh(2, 2, 2), abstract("unet, SDXL"))).items()}
    block = "model/mid_block/attentions_0/transformer_blocks"
    assert specs[f"{block}/attn2/to_k/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs[f"{block}/attn1/to_out_0/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{block}/ff/net_0/proj/bias"] == PartitionSpec(None, "tensor")
    assert specs["model/mid_block/resnets_0/conv1/kernel"] == PartitionSpec(None, None, "fsdp", "tensor")


def test_an_axis_that_the_mesh_does_not_divide_gives_way_to_another():
    """576 in 64 parts, but not in 128: then the hidden width, 1536, is cut instead of it."""
    path = "model/layers/mlp/gate_proj/kernel"
    specs = [by_path(tree_shardings(mesh(fsdp=n), abstract("decoder, tied")))[path].spec for n in (64, 128)]
    assert specs == [PartitionSpec(None, "fsdp"), PartitionSpec(None, None, "fsdp")]


def test_lora_factors_are_cut_as_their_kernel():
    params = {"layers": {"self_attn": {"q_proj": {"kernel": jnp.zeros((2, 64, 32))}}}}
    lora = jax.eval_shape(lambda: add_lora(params, LoRA(rank=4, alpha=4.0, targets=("q_proj",)), jax.random.key(0)))
    specs = {p: s.spec for p, s in by_path(tree_shardings(mesh(1, 2, 2), {"lm": lora})).items()}
    assert specs["lm/layers/self_attn/q_proj/lora_a"] == PartitionSpec(None, "fsdp")
    assert specs["lm/layers/self_attn/q_proj/lora_b"] == PartitionSpec(None, None, "tensor")


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "stand-in"


def test_devices_of_several_slices_lie_slice_by_slice():
    """As JAX numbers them on several hosts of GPUs, and in another order."""
    devices = [Device(n, n % 2) for n in range(8)]
    made = make_mesh(2, None, 2, devices)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [[device.slice_index for device in row.flat] for row in made.devices] == [[0] * 4, [1] * 4]
    whole = make_mesh(1, None, 2, devices)
    assert [device.slice_index for device in whole.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(ShardingError, match="tensor 8 would span slices of 4 devices"):
        make_mesh(1, None, 8, devices)


@pytest.mark.parametrize("sizes", [(0, None, 1), (-2, None, -1), (1, 0, 1)])
def test_sizes_of_a_mesh_are_positive(sizes):
    with pytest.raises(ShardingError, match="sizes are 1 or more"):
        make_mesh(*sizes)


def test_a_mesh_of_other_axes_is_refused():
    other = AbstractMesh((2,), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(ShardingError, match=r"axes \('model',\), not .*: make it with make_mesh"):
        tree_shardings(other, {"x": jnp.zeros(4)})


def test_norms_of_stacked_blocks_have_an_axis_of_their_own():
    """Not the default, which would cut the longest axis that the mesh divides, the stack's too."""
    assert logical_axes("unet/mid_block/attentions_0/transformer_blocks/norm1/weight") == (None,)


def test_a_users_rule_comes_first_and_must_fit():
    tree = {"lm": {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}}
    by_rule = tree_shardings(mesh(fsdp=2), tree, (("lm_head", PartitionSpec(None, "fsdp")),))
    assert by_path(by_rule)["lm/lm_head/kernel"].spec == PartitionSpec(None, "fsdp")
    with pytest.raises(ShardingError, match=r"cuts axis 0 .* into 4 parts"):
        tree_shardings(mesh(fsdp=4), tree, (("lm_head", PartitionSpec("fsdp")),))


def constraints(of_mesh, function, *shapes):
    """The sharding constraints of a function traced for a mesh, in order."""

    def traced(*arrays):
        with activation_rules(of_mesh):
            return function(*arrays)

    jaxpr = jax.make_jaxpr(traced)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return [eqn.params["sharding"].spec for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]


def test_activations_are_placed_by_name():
    """What the mesh does not divide is left to the compiler; the axis of a vmap is, too."""
    free = PartitionSpec.UNCONSTRAINED
    place = lambda x: constrain(x, "batch", "length", "heads", None)  # noqa: E731
    assert constraints(mesh(2, 2, 2), place, (8, 5, 4, 3)) == [PartitionSpec(("data", "fsdp"), None, "tensor", None)]
    assert constraints(mesh(2, 2, 2), place, (8, 5, 3, 3)) == [PartitionSpec(("data", "fsdp"), None, free, None)]
    [spec] = constraints(mesh(2, 2, 2), jax.vmap(place), (2, 8, 5, 4, 3))
    assert spec[1:] == (("data", "fsdp"), None, "tensor", None)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "residual") is x
