"""The DPO family of losses on a system's margin, under TRL's names.

Each takes the log-ratios log p_theta / p_ref of the chosen and the rejected run, [batch] in nats, and returns [batch].
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float


def sigmoid_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m): DPO (arXiv 2305.18290, equation 7), cDPO for e > 0."""
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def robust_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """The unbiased estimate under labels flipped with probability e < 0.5 (arXiv 2403.00409, equation 10)."""
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    biased = -(1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin)
    return biased / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """(m - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17), on the system's summed log-ratios, not on token means."""
    chex.assert_equal_shape([chosen, rejected])
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """max(0, 1 - beta m) (SLiC, arXiv 2305.10425; as a function of the log-ratios: arXiv 2309.06657)."""
    chex.assert_equal_shape([chosen, rejected])
    return jax.nn.relu(1 - beta * (chosen - rejected))


def exo_pair_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """KL from sigmoid(+-beta m) to the smoothed label (arXiv 2402.00856, equation 16); e = 0 means 1e-3, as in TRL."""
    chex.assert_equal_shape([chosen, rejected])
    margin, e = beta * (chosen - rejected), label_smoothing or 1e-3
    agree = sigmoid(margin) * (log_sigmoid(margin) - jnp.log1p(-e))
    return agree + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(e))


def apo_zero_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Raise the winner and lower the loser, each against the reference (arXiv 2408.06266, equation 7)."""
    chex.assert_equal_shape([chosen, rejected])
    return (1 - sigmoid(beta * chosen)) + sigmoid(beta * rejected)


def apo_down_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Lower both, the loser more (arXiv 2408.06266, equation 8)."""
    chex.assert_equal_shape([chosen, rejected])
    return sigmoid(beta * chosen) + (1 - sigmoid(beta * (chosen - rejected)))


LOSSES: dict[str, Callable[..., Float[Array, "batch"]]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "exo_pair": exo_pair_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
}
"""The losses by name: functions of the log-ratios of both sides, beta and label_smoothing, see this file."""

# The losses that read label_smoothing; for the others a value would be silently ignored, so it is refused.
SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair"})
