"""Attention on TPUs without its matrix of scores: jax's splash kernel, padded to its blocks.

Axes: B batch, L length, S slots, H heads, G key-value heads, K head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from sysdpo_jax.models.attention_request import Queries, Slots

LANES, MAX_BLOCK = 128, 512


def flash(queries: Queries, keys: Slots, values: Slots, scale: float, causal: bool, window: int | None) -> Queries:
    """softmax(scale q k) v block by block (arXiv 2205.14135), its backward pass too; any length and head width.

    The scale is multiplied into the queries, so that in bfloat16 they are rounded once more.
    """
    length, slots, heads = queries.shape[1], keys.shape[1], queries.shape[2]
    block_q, block_kv = _block(length), _block(slots)
    queries = _padded((queries * scale).astype(queries.dtype), block_q)
    keys, values = _padded(keys, block_kv), _padded(values, block_kv)
    shape = queries.shape[2], keys.shape[2]
    mask: masks.Mask = masks.FullMask(shape)
    if causal:
        mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        # The fused backward kernel would keep a copy of the queries' gradient for every block of slots.
        block_sizes=kernels.BlockSizes(*(block_q, block_kv, block_kv) * 2, block_q_dq=block_q, block_kv_dq=block_kv),
        head_shards=1,
        q_seq_shards=1,
    )
    segments = None
    if shape[1] > slots and not (causal and length <= slots):
        # Queries are all of the segment of the real slots.
        segments = kernels.SegmentIds(jnp.zeros(shape[0], jnp.int32), (jnp.arange(shape[1]) >= slots).astype(jnp.int32))
    mixed = jax.vmap(kernel, in_axes=(0, 0, 0, None))(queries, keys, values, segments)
    return mixed[:, :, :length].transpose(0, 2, 1, 3)


def _block(length: int) -> int:
    """The multiple of LANES, at most MAX_BLOCK, that covers the length in few blocks with little to spare."""
    blocks = -(-length // MAX_BLOCK)
    return -(-length // (blocks * LANES)) * LANES


def _padded(x: Queries, block: int) -> Float[Array, "batch heads padded width"]:
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
