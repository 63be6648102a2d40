"""Attention, softmax(scale q k) v (arXiv 1706.03762, equation 1), by the means that suit the platform.

Axes: B batch, L length, S slots, H heads, G key-value heads, K head width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sysdpo_jax.models import cudnn
from sysdpo_jax.models.attention_request import AttentionRequest, Queries, Slots
from sysdpo_jax.models.blocks import BLOCK, blockwise
from sysdpo_jax.models.partitioning import on_own_heads

# What a configuration's `attention` may name.
IMPLEMENTATIONS = ("auto", "plain", "blocks", "xla", "cudnn", "flash")
FUSED = {"tpu": "flash", "gpu": "cudnn"}
# What takes the place of an implementation that only a mesh can spread over devices.
INSTEAD = {"flash": "xla", "cudnn": "xla", "blocks": "plain"}
# Shorter than the kernel's smallest block, the matrix of scores is small and plain products are as good.
MIN_FLASH_LENGTH = 128
# Where programs that are traced will run, if not here.
_BACKEND: ContextVar[str | None] = ContextVar("_BACKEND", default=None)


def attend(
    queries: Queries,
    keys: Slots,
    values: Slots,
    visible: Bool[Array, "#batch length slots"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    implementation: str = "auto",
) -> Queries:
    """softmax(scale q k) v with the softmax in float32; heads may share key-value heads (arXiv 2305.13245).

    A query that sees no slot gets a finite average.
    visible: which slots a query sees, all by default. scale: 1 / sqrt(K) by default.
    softcap: c in c tanh(scores / c), which bounds the scores (Gemma 2, arXiv 2408.00118, section 2).
    causal: query i sees slot j only where j <= i, and with a window (arXiv 2004.05150) only where i - j < window.
    implementation: one of IMPLEMENTATIONS, see `choose`.
    Raises ValueError for a window without `causal` and for an implementation that cannot do this.
    """
    if window is not None and not causal:
        raise ValueError(f"attend: window {window} needs causal=True")
    restricted = visible is not None, softcap is not None, causal, window
    request = AttentionRequest.of(queries, keys, values, *restricted)
    kind = choose(implementation, backend(), request)
    if kind in INSTEAD and implementation == "auto" and jax.device_count() > 1:
        # The compiler cannot cut a kernel or a loop over rows, and without a mesh nobody says how to spread it.
        kind = INSTEAD[kind] if jax.sharding.get_abstract_mesh().empty else kind
    if kind == "plain":
        return _plain(queries, keys, values, _both(visible, queries, keys, causal, window), scale, softcap)
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    if kind == "xla":
        return jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            mask=None if visible is None else visible[:, None],
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="xla",
        )
    if kind == "blocks":
        block_by_block = partial(blockwise, scale=scale, softcap=softcap, causal=causal, window=window)
        masks = [] if visible is None else [jnp.broadcast_to(visible, (queries.shape[0], *visible.shape[1:]))]
        return on_own_heads(block_by_block, queries, keys, values, *masks)
    if kind == "flash":
        # Importing Pallas takes half a second, which only TPUs get something for.
        from sysdpo_jax.models.flash import flash as kernel
    else:
        kernel = cudnn.cudnn
    return on_own_heads(partial(kernel, scale=scale, causal=causal, window=window), queries, keys, values)


@contextmanager
def compiling_for(backend: str) -> Iterator[None]:
    """In the block "auto" chooses as on this one of jax's backends, whatever is at hand: to compile ahead of time."""
    token = _BACKEND.set(backend)
    try:
        yield
    finally:
        _BACKEND.reset(token)


def backend() -> str:
    """The backend that programs are traced for."""
    return _BACKEND.get() or jax.default_backend()


def choose(implementation: str, backend: str, request: AttentionRequest) -> str:
    """The implementation for a request on one of jax's backends.

    "plain": matrix products and a softmax written here.
    "blocks": the same on CPUs block by block, so that scores stay in the cache, see `blocks`.
    "xla": `jax.nn.dot_product_attention`, the same with fewer passes over the scores on accelerators.
    "cudnn": cuDNN's fused attention, for NVIDIA GPUs since Ampere, see `cudnn`.
    "flash": jax's splash kernel for TPUs, see `flash`.
    "auto": on a TPU flash from MIN_FLASH_LENGTH queries on, on such a GPU cudnn, where these can run (with several
    devices only under a mesh); else xla, and with a soft cap plain; on a CPU plain where one block holds all scores,
    else blocks (with several devices only under a mesh). Only blocks, cudnn and flash never hold scores [B, H, L, S].

    Raises ValueError for an unknown name and for a named implementation that cannot run, with the reason.
    """
    check_attention(implementation, "attend")
    if implementation != "auto":
        reason = _refusal(implementation, request)
        if reason is not None:
            raise ValueError(f"attend: attention {implementation!r} {reason} ({request}); choose another or 'auto'")
        return implementation
    if backend == "cpu":
        return "blocks" if request.batch * request.heads * request.length * request.slots > BLOCK else "plain"
    if request.softcap:
        return "plain"
    fused = FUSED.get(backend, "xla")
    short = fused == "flash" and request.length < MIN_FLASH_LENGTH
    return "xla" if short or _refusal(fused, request) else fused


def check_attention(name: str, where: str) -> None:
    """Raises ValueError unless the name is one of IMPLEMENTATIONS."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: unknown attention {name!r}: choose among {', '.join(IMPLEMENTATIONS)}")


def _refusal(implementation: str, request: AttentionRequest) -> str | None:
    """Why an implementation cannot run, None if it can."""
    if implementation == "cudnn":
        return cudnn.refusal(request)
    if implementation in ("plain", "blocks"):
        return None
    if request.softcap:
        return "has no soft cap on scores"
    if implementation == "xla":
        return None
    if request.masked:
        return "takes no mask, only causal attention and windows"
    return None if request.dtype in ("float32", "bfloat16") else "computes in float32 and bfloat16 only"


def _both(
    visible: Array | None, queries: Array, keys: Array, causal: bool, window: int | None
) -> Bool[Array, "rows length slots"] | None:
    """The mask of what the caller and causality let a query see; one row where it is the same in all."""
    if not causal:
        return visible
    behind = jnp.arange(queries.shape[1])[:, None] - jnp.arange(keys.shape[1])
    seen = (behind >= 0)[None] if window is None else ((behind >= 0) & (behind < window))[None]
    return seen if visible is None else seen & visible


def _plain(
    queries: Array, keys: Array, values: Array, visible: Array | None, scale: float | None, softcap: float | None
) -> Queries:
    """The heads that share a key-value head are stacked along the length: one matrix product per group."""
    batch, length, heads, width = queries.shape
    slots, groups = keys.shape[1:3]
    split = queries.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    stacked = split.reshape(batch, groups, -1, width)
    scores = jnp.matmul(stacked, keys.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = (scores / math.sqrt(width) if scale is None else scores * scale).reshape(batch, heads, length, slots)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if visible is not None:
        scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    stacked = weights.astype(values.dtype).reshape(batch, groups, -1, slots)
    mixed = jnp.matmul(stacked, values.transpose(0, 2, 1, 3)).reshape(batch, heads, length, width)
    return mixed.transpose(0, 2, 1, 3)
