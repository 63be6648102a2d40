"""Each loss equals TRL's formula, evaluated in float64 by torch's own functions on the same log-ratios."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, logsigmoid, relu

from sysdpo_jax.objectives.direct import DirectObjective
from sysdpo_jax.objectives.losses import LOSSES, SMOOTHED

CHOSEN = np.array([-30.0, -2.0, 0.0, 0.3, 4.0, 25.0])
REJECTED = np.array([5.0, -1.0, 0.0, -0.4, 9.0, -40.0])
BETA = 0.1


def bce(margin, e):
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m) as a binary cross-entropy with a soft label."""
    return binary_cross_entropy_with_logits(margin, torch.full_like(margin, 1 - e), reduction="none")


def exo(margin, e):
    e = e or 1e-3
    model = torch.stack([logsigmoid(margin), logsigmoid(-margin)], -1)
    label = torch.tensor([1 - e, e], dtype=torch.float64).log().expand_as(model)
    return kl_div(label, model, reduction="none", log_target=True).sum(-1)


FORMULAS = {
    "sigmoid": lambda c, r, e: bce(BETA * (c - r), e),
    "robust": lambda c, r, e: (
        (1 - e) * bce(BETA * (c - r), 0.0) - e * bce(BETA * (c - r), 1.0)
    ) / (1 - 2 * e),
    "ipo": lambda c, r, e: (c - r - 1 / (2 * BETA)).square(),
    "hinge": lambda c, r, e: relu(1 - BETA * (c - r)),
    "exo_pair": lambda c, r, e: exo(BETA * (c - r), e),
    "apo_zero": lambda c, r, e: 1 - torch.sigmoid(BETA * c) + torch.sigmoid(BETA * r),
    "apo_down": lambda c, r, e: torch.sigmoid(BETA * c) + 1 - torch.sigmoid(BETA * (c - r)),
}  # fmt: skip

# Values of three of them worked out by hand at chosen = 2, rejected = -3, beta = 0.1 (margin 0.5).
BY_HAND = {"sigmoid": 0.4740769842, "hinge": 0.5, "ipo": 0.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_the_formula(name, smoothing):
    """1e-5 relative: our float32 against float64."""
    expected = FORMULAS[name](torch.tensor(CHOSEN), torch.tensor(REJECTED), smoothing)
    ours = LOSSES[name](jnp.float32(CHOSEN), jnp.float32(REJECTED), BETA, smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), BY_HAND.items())
def test_loss_equals_the_value_worked_out_by_hand(name, value):
    got = LOSSES[name](jnp.float32([2.0]), jnp.float32([-3.0]), BETA, 0.0)
    np.testing.assert_allclose(got, [value], atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="unknown loss 'dpo'"):
        DirectObjective(loss="dpo")
    with pytest.raises(ValueError, match="beta must be positive"):
        DirectObjective(beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing must lie"):
        DirectObjective(label_smoothing=0.5)
    for name in set(LOSSES) - SMOOTHED:
        with pytest.raises(ValueError, match="does not use label_smoothing"):
            DirectObjective(loss=name, label_smoothing=0.1)
