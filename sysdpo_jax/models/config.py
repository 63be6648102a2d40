"""What the models' configurations share: precision, the means of attention, and what the backward pass recomputes."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from sysdpo_jax.models.attention import check_attention

# A configuration's `remat` -> the policy of jax.checkpoint_policies, which says what is kept.
POLICIES: dict[str, Any] = {
    "full": None,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def recomputed(block: Any, remat: str | None, prevent_cse: bool = True) -> Any:
    """The block's class, recomputing as `remat` says: None nothing, "full" all but its inputs, else by the policy.

    "dots_saveable" keeps the results of all matrix products, "dots_with_no_batch_dims_saveable" those of dense layers
    without attention's scores. prevent_cse: needed unless the block is the body of a scan, which must
    run more than once: the compiler takes a loop of one round apart and merges what is computed twice.
    """
    return block if remat is None else nn.remat(block, prevent_cse=prevent_cse, policy=POLICIES[remat])


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A configuration with a precision of its products.

    dtype: precision of the products; norms, softmax and the output are float32 in any case.
    param_dtype: precision that the parameters are kept in.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class BlockOptions(Precision):
    """How the blocks of a model are computed; remat and attention change nothing in what they compute.

    remat: what of each block is recomputed in the backward pass, see `recomputed`.
    attention: how attention is computed, see `attention.choose`.
    Raises ValueError for a name that these do not know.
    """

    remat: str | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_attention(self.attention, where)
        if self.remat is not None and self.remat not in POLICIES:
            raise ValueError(f"{where}: unknown remat {self.remat!r}: choose None or one of {', '.join(POLICIES)}")
