"""Diffusion and flow: noise schedules, weightings of timesteps, samplers."""

from sysdpo_jax.diffusion.schedules import NoiseSchedule
from sysdpo_jax.diffusion.weightings import Constant

__all__ = [
    "Constant",
    "NoiseSchedule",
]
