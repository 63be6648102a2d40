"""The DPO family of losses on a system's margin, under TRL's names.

Each takes the log-ratios log p_theta / p_ref of the chosen and the rejected run, [batch] in nats, and returns [batch].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from sysdpo_jax.typing import Rows


def sigmoid_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m): DPO (arXiv 2305.18290, equation 7), cDPO for e > 0."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def robust_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """The unbiased estimate under labels flipped with probability e < 0.5 (arXiv 2403.00409, equation 10)."""
    margin = beta * (chosen - rejected)
    biased = -(1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin)
    return biased / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """(m - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17), on the system's summed log-ratios, not on token means."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """max(0, 1 - beta m) (SLiC, arXiv 2305.10425; as a function of the log-ratios: arXiv 2309.06657)."""
    return jax.nn.relu(1 - beta * (chosen - rejected))


def exo_pair_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """KL from sigmoid(+-beta m) to the smoothed label (arXiv 2402.00856, equation 16); e = 0 means 1e-3, as in TRL."""
    margin, e = beta * (chosen - rejected), label_smoothing or 1e-3
    agree = sigmoid(margin) * (log_sigmoid(margin) - jnp.log1p(-e))
    return agree + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(e))


def apo_zero_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """Raise the winner and lower the loser, each against the reference (arXiv 2408.06266, equation 7)."""
    return (1 - sigmoid(beta * chosen)) + sigmoid(beta * rejected)


def apo_down_loss(chosen: Rows, rejected: Rows, beta: float, label_smoothing: float = 0.0) -> Rows:
    """Lower both, the loser more (arXiv 2408.06266, equation 8)."""
    return sigmoid(beta * chosen) + (1 - sigmoid(beta * (chosen - rejected)))


LOSSES: dict[str, Callable[..., Rows]] = {
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
