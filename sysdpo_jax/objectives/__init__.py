"""Objectives: functions of (system, params, reference, batch, key), blind to the kinds of component they sum over."""

from sysdpo_jax.objectives.direct import DirectObjective
from sysdpo_jax.objectives.log_ratio import NodeLogps, log_ratio, node_log_probs
from sysdpo_jax.objectives.losses import LOSSES
from sysdpo_jax.objectives.objective import Aux, Objective
from sysdpo_jax.objectives.sampling import SamplingObjective

__all__ = [
    "LOSSES",
    "Aux",
    "DirectObjective",
    "NodeLogps",
    "Objective",
    "SamplingObjective",
    "log_ratio",
    "node_log_probs",
]
