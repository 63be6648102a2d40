"""What of a block's activations is recomputed in the backward pass instead of kept."""

from typing import Any

import flax.linen as nn
import jax

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


def check_remat(remat: str | None, where: str) -> None:
    """Raises ValueError for what `recomputed` does not know."""
    if remat is not None and remat not in POLICIES:
        raise ValueError(f"{where}: unknown remat {remat!r}: choose None or one of {', '.join(POLICIES)}")
