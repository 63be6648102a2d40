"""Noise schedules, weightings of the denoising error, and samplers."""

from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler, Sampler
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule
from sysdpo_jax.diffusion.weightings import ELBO, Constant, MinSNR, Weighting

__all__ = [
    "DDIM",
    "DDPM",
    "ELBO",
    "PNDM",
    "Constant",
    "DPMSolver",
    "Euler",
    "FlowEuler",
    "FlowSchedule",
    "MinSNR",
    "NoiseSchedule",
    "Sampler",
    "Weighting",
]
