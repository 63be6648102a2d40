"""Logical axes: what the axes of every parameter and activation mean.

A mesh maps logical axes to its own (`parallel.sharding.LOGICAL_RULES`), so no model knows a mesh.
Of parameters: embed, the width of the residual stream; heads, mlp, channels, vocab, what lies between two maps.
Of activations: batch, length, height, width, residual (the stream itself), and the same heads, mlp, channels, vocab.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

from sysdpo_jax.models.attention_request import Queries, Slots

# Names of trailing axes; the axes before them (stacked layers, a convolution's window) have no name and are never cut.
Axes = tuple[str | None, ...]

# The axes of a kernel or embedding, input first, and the ends of the paths of the modules that have them, as regular
# expressions. The first that fits counts.
LAYERS: dict[Axes, tuple[str, ...]] = {
    ("vocab", "embed"): ("embed_tokens", "token_embedding", "shared"),
    ("embed", "vocab"): ("lm_head",),
    ("embed", "heads"): ("self_attn/[qkv]_proj", "SelfAttention/[qkv]", "attn[12]?/(to_[qkv]|add_[qkv]_proj)"),
    ("heads", "embed"): ("self_attn/(o|out)_proj", "SelfAttention/o", "attn[12]?/(to_out_0|to_add_out)"),
    (None, "heads"): ("relative_attention_bias",),
    ("embed", "mlp"): (
        *("mlp/(gate_proj|up_proj|fc1)", "DenseReluDense/wi_[01]", "ff(_context)?/net_0/proj"),
        *("(time|add)_embedding/linear_1", "(timestep|text)_embedder/linear_1", "norm(1|1_context|_out)/linear"),
    ),
    ("mlp", "embed"): (
        *("mlp/(down_proj|fc2)", "DenseReluDense/wo", "ff(_context)?/net_2"),
        *("(time|add)_embedding/linear_2", "(timestep|text)_embedder/linear_2"),
    ),
    # A residual block's inner channels are cut as a feed-forward layer's hidden width is.
    ("embed", "channels"): (r"resnets_\d+/(conv1|time_emb_proj)",),
    ("channels", "embed"): (r"resnets_\d+/conv2",),
    (None, "embed"): (
        *("position_embedding", "pos_embed/proj", "context_embedder", r"attentions_\d+/proj_(in|out)"),
        *("conv_in", r"resnets_\d+/conv_shortcut", "(down|up)samplers_0/conv"),
    ),
    ("embed", None): ("text_projection", "conv_out", "proj_out"),
    (None, None): ("layers/.*norm", r"transformer_blocks/norm\d"),
}


@functools.cache
def logical_axes(path: str) -> Axes | None:
    """The logical axes of a parameter's last axes, by its path `module/leaf`; None where the table does not know it.

    A bias and a norm's weight have the output axis of their module. LoRA's factors have its input axis (lora_a) and its
    output axis (lora_b); their rank is never cut.
    """
    module, _, leaf = path.rpartition("/")
    for (first, last), ends in LAYERS.items():
        if re.search(rf"(^|/)({'|'.join(ends)})$", module):
            both: Axes = (first, last)
            own: dict[str, Axes] = {"bias": (last,), "weight": (last,), "lora_a": (first, None), "lora_b": (None, last)}
            return own.get(leaf, both if leaf in ("kernel", "embedding") else None)
    return None


def constrain(x: Array, *names: str | None) -> Array:
    """Place an activation on the mesh of the trace by the logical axes of its axes; without rules or mesh, x itself.

    An axis whose size the mesh does not divide is left to the compiler. Never changes a value.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules: dict[str | None, Any] = dict(get_logical_axis_rules())
    if mesh.empty or not rules:
        return x
    if mesh.manual_axes:
        # Within `on_own_rows` the rows are cut already.
        names = tuple(None if set(mesh.manual_axes) & set(_axes(rules.get(name))) else name for name in names)
    axes = tuple(
        name if size % num_parts(mesh.shape, rules.get(name)) == 0 else PartitionSpec.UNCONSTRAINED
        for name, size in zip(names, x.shape, strict=True)
    )
    return nn.with_logical_constraint(x, axes)


def gathered_kernel(path: tuple[str, ...], kernel: Array) -> Array:
    """A module's kernel as its products use it: gathered over fsdp, cut over tensor where the table says so.

    Left to itself the compiler may move a convolution's activations instead, which are larger. path: the module's.
    """
    axes = logical_axes("/".join((*path, "kernel")))
    if axes is None:
        return kernel
    names = (None if name == "embed" else name for name in axes)
    return constrain(kernel, *(None,) * (kernel.ndim - len(axes)), *names)


def residual(x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
    """`constrain` for a sequence model's residual stream: its width is whole on every device."""
    return constrain(x, "batch", "length", "residual")


def on_own_rows(function: Callable[..., Array], shared: PyTree, *rows: Shaped[Array, "batch ..."]) -> Array:
    """function(shared, *rows) -> [batch, ...], each device with its own rows and the whole of what is shared.

    Around a loop over stretches of the rows this gathers `shared` once before it and sums its gradient over devices
    once after it, where the compiler would do both in every round. What lies over tensor stays cut. A plain call
    without a mesh and where the mesh does not divide the rows.
    """
    mesh, names = jax.sharding.get_abstract_mesh(), dict(get_logical_axis_rules()).get("batch") or ()
    # The compiler refuses sums over axes of one device beside an axis that it cuts itself.
    axes = () if mesh.empty else tuple(name for name in _axes(names) if mesh.shape[name] > 1)
    if not axes or rows[0].shape[0] % num_parts(mesh.shape, axes):
        return function(shared, *rows)
    spec = PartitionSpec(axes)
    places = (PartitionSpec(), *(spec,) * len(rows))
    # check_vma=True would sum the gradient where `shared` meets the rows: in every round.
    return jax.shard_map(function, in_specs=places, out_specs=spec, axis_names=set(axes), check_vma=False)(
        shared, *rows
    )


def on_own_heads(
    kernel: Callable[..., Queries], queries: Queries, keys: Slots, values: Slots, *of_rows: Shaped[Array, "batch ..."]
) -> Queries:
    """kernel(queries, keys, values, *of_rows), each device with its own rows and heads: the compiler cannot cut it.

    They lie as the rules in force lay out the axes "batch" and "heads"; one that does not divide is whole on every
    device. A plain call without a mesh or on a mesh of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(queries, keys, values, *of_rows)
    rows, _, heads, _ = nn.logical_to_mesh_axes(("batch", None, "heads", None)) or (None,) * 4
    if queries.shape[0] % num_parts(mesh.shape, rows):
        rows = None
    # A head stays with the key-value head that it reads.
    if keys.shape[2] % num_parts(mesh.shape, heads):
        heads = None
    spec = PartitionSpec(rows, None, heads, None)
    places = (spec, spec, spec, *(PartitionSpec(rows),) * len(of_rows))
    return jax.shard_map(kernel, in_specs=places, out_specs=spec, check_vma=False)(queries, keys, values, *of_rows)


def num_parts(sizes: Mapping[str, int], mesh_axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts an axis is cut that lies over these axes of a mesh of these sizes."""
    return math.prod(sizes[name] for name in _axes(mesh_axes))


def _axes(mesh_axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
