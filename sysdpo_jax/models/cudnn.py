"""Attention on NVIDIA GPUs without its matrix of scores: cuDNN's fused kernel, all that it asks for, and the padding.

Axes: B batch, L length, S slots, H heads, G key-value heads, K head width.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.attention_request import AttentionRequest, Queries, Slots

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16")
# Of cuDNN's fused attention on every GPU that has it; JAX lets Hopper and later have 256.
MAX_WIDTH = 128
# Head widths must be multiples of it. Lengths must be even when gradients are taken, which a function that is traced
# cannot know, and are padded to it: the products of a block then use whole vectors.
MULTIPLE = 8
# Ampere: the first with the kernel.
MIN_CAPABILITY = 8


def refusal(request: AttentionRequest) -> str | None:
    """Why the kernel cannot run, None if it can, forward and backward.

    The conditions of `jax.nn.dot_product_attention(implementation="cudnn")` (JAX 0.10 to 0.12, jax._src.cudnn) and of
    cuDNN 9's graph behind it. Those that JAX checks itself are asked of it last, so that a version with more of them is
    found out here and not in the middle of a step.
    """
    if request.masked:
        # A mask becomes a bias [B, H, L, S], which is what the kernel is there to avoid.
        return "takes no mask, only causal attention and windows"
    if request.softcap:
        return "has no soft cap on scores"
    if request.dtype not in DTYPES:
        return f"computes in {' and '.join(DTYPES)} only"
    if request.width % MULTIPLE or request.width > MAX_WIDTH:
        return f"needs a head width that is a multiple of {MULTIPLE} and at most {MAX_WIDTH}"
    if request.window is not None and request.length > request.slots:
        return "takes a window only where there are at least as many slots as queries"
    if not _is_there():
        return f"needs an NVIDIA GPU of compute capability {MIN_CAPABILITY}.0 or more"
    return _own_refusal(request)


def cudnn(queries: Queries, keys: Slots, values: Slots, scale: float, causal: bool, window: int | None) -> Queries:
    """softmax(scale q k) v in cuDNN's kernel, its backward pass too; lengths are padded to `MULTIPLE`.

    Queries that were added are cut off again. Slots that were added are hidden: by causality, or by the number of slots
    that count, which the kernel does not take beside a window (see `refusal`).
    """
    batch, length = queries.shape[:2]
    slots = keys.shape[1]
    queries, keys, values = (_padded(x) for x in (queries, keys, values))
    hidden = keys.shape[1] == slots or (causal and length <= slots)
    mixed = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=None if hidden else jnp.full(batch, slots, jnp.int32),
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed[:, :length]


def _padded(x: Queries) -> Float[Array, "batch padded heads width"]:
    spare = -x.shape[1] % MULTIPLE
    return jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))) if spare else x


def _is_there() -> bool:
    # AMD's capabilities are named otherwise ("gfx90a").
    if jax.default_backend() != "gpu":
        return False
    major = str(jax.local_devices(backend="gpu")[0].compute_capability).partition(".")[0]
    return major.isdigit() and int(major) >= MIN_CAPABILITY


@functools.cache
def _own_refusal(request: AttentionRequest) -> str | None:
    """What JAX says against the call when it is traced with its gradient: versions of cuDNN, newer conditions."""
    queries = jax.ShapeDtypeStruct((request.batch, request.length, request.heads, request.width), request.dtype)
    keys = jax.ShapeDtypeStruct((request.batch, request.slots, request.groups, request.width), request.dtype)
    run = functools.partial(cudnn, scale=1.0, causal=request.causal, window=request.window)
    try:
        jax.eval_shape(lambda q, k, v: jax.vjp(run, q, k, v)[1](q), queries, keys, keys)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        logger.warning("attention of %s does without cuDNN's fused kernel, which JAX refuses: %s", request, said)
        return f"is refused by JAX ({said})"
    return None
