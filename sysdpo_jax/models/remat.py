"""What the backward pass computes again: the settings of `remat`, and what "auto" among them stands for in a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

AUTO = "auto"
WHOLE = "whole"
# Fused attention, whose products a policy of JAX does not see.
KERNELS = ("dot_product_attention_fwd_wrapper", "pallas_call")
# (primitive, what goes in, its parameters) -> whether its result is kept, as jax.checkpoint takes it.
Policy: TypeAlias = Callable[..., bool]
T = TypeVar("T")


def products_saveable(primitive: Any, *values: Any, **params: Any) -> bool:
    """Keep what dense layers, convolutions and fused attention give: norms, activations and scores come again.

    It is jax's dots_with_no_batch_dims_saveable and the products that are no dots to it: the backward pass would apply
    every convolution of a U-Net a second time, and every kernel of attention.
    """
    if primitive.name == "conv_general_dilated" or primitive.name in KERNELS:
        return True
    return bool(jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *values, **params))


# A configuration's `remat` -> the policy of jax.checkpoint_policies, which says what is kept.
POLICIES: dict[str, Policy | None] = {
    WHOLE: None,
    "full": None,
    "products_saveable": products_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
SETTINGS = (AUTO, *POLICIES)


@dataclass
class Choice:
    """What "auto" stands for while a program is traced, and whether the trace has asked for it."""

    setting: str | None
    asked: bool = False


_CHOICE: ContextVar[Choice | None] = ContextVar("_CHOICE", default=None)


@contextmanager
def choosing(setting: str | None) -> Iterator[Choice]:
    """What is traced in the block has this setting for "auto"; elsewhere it is None.

    Args:
        setting: None or one of POLICIES.

    Yields:
        What tells whether a trace has asked.
    """
    choice = Choice(setting)
    token = _CHOICE.set(choice)
    try:
        yield choice
    finally:
        _CHOICE.reset(token)


def recomputed(block: Any, remat: str | None, dtype: str, prevent_cse: bool = True) -> Any:
    """The block's class, recomputing as `remat` says: None nothing, "full" all but its inputs, else by the policy.

    "whole" is "full" within `of_model`.

    "dots_saveable" keeps the results of all matrix products, "dots_with_no_batch_dims_saveable" those of dense layers
    without attention's scores, "products_saveable" those and convolutions and fused attention; "auto" is what the
    training step chooses, see `choosing`.

    A block in bfloat16 recomputes under None too, but only the float32 numbers within norms, softmax and the like on
    their way to a result: kept, they would be summed in another order than in the reference's forward pass, which keeps
    nothing, and a last bit of difference grows over the layers.

    dtype: precision of the block's products. prevent_cse: needed unless the block is the body of a scan, which must run
    more than once: the compiler takes a loop of one round apart and merges what is computed twice.
    """
    remat = _resolved(remat)
    if remat is not None:
        return nn.remat(block, prevent_cse=prevent_cse, policy=POLICIES[remat])
    bits = jnp.finfo(dtype).bits
    return block if bits >= 32 else nn.remat(block, prevent_cse=prevent_cse, policy=_no_wider(bits))


def of_model(log_prob: Callable[..., T], remat: str | None) -> Callable[..., T]:
    """The log-probability of a model of this setting: under "whole" the backward pass keeps what goes in, and nothing
    else, until its turn comes. Of several models that follow each other one at a time then has activations in memory.
    """
    made: Callable[..., T] = jax.checkpoint(log_prob) if one_at_a_time(remat) else log_prob
    return made


def one_at_a_time(remat: str | None) -> bool:
    """Whether models of this setting are to be in memory one after the other."""
    return _resolved(remat) == WHOLE


def _resolved(remat: str | None) -> str | None:
    """The setting, or what "auto" stands for."""
    if remat != AUTO:
        return remat
    choice = _CHOICE.get()
    if choice is not None:
        choice.asked = True
    return None if choice is None else choice.setting


def _no_wider(bits: int) -> Policy:
    """Keeps every product, and what is computed of and given in no more bits than these."""

    def kept(primitive: Any, *values: Any, **params: Any) -> bool:
        if primitive.name in ("dot_general", "conv_general_dilated", *KERNELS):
            return True
        if primitive.name == "convert_element_type":
            return _bits(params["new_dtype"]) <= bits
        return all(_bits(value.dtype) <= bits for value in values if hasattr(value, "dtype"))

    return kept


def _bits(dtype: Any) -> int:
    """Of a floating-point number; 0 for other types, whose values no precision rounds."""
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0
