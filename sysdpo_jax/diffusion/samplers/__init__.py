"""Samplers that turn noise into latents with a denoising function, one file each; base.py holds what they share.

All are frozen dataclasses (static arguments of a jitted function), to be called under jit: one compilation each.
"""

from sysdpo_jax.diffusion.samplers.base import Denoiser, Sampler, guided, guides
from sysdpo_jax.diffusion.samplers.ddim import DDIM
from sysdpo_jax.diffusion.samplers.ddpm import DDPM
from sysdpo_jax.diffusion.samplers.dpm_solver import DPMSolver
from sysdpo_jax.diffusion.samplers.euler import Euler
from sysdpo_jax.diffusion.samplers.flow import FlowEuler
from sysdpo_jax.diffusion.samplers.pndm import PNDM
from sysdpo_jax.diffusion.samplers.tables import Spacing

__all__ = [
    "DDIM",
    "DDPM",
    "PNDM",
    "DPMSolver",
    "Denoiser",
    "Euler",
    "FlowEuler",
    "Sampler",
    "Spacing",
    "guided",
    "guides",
]
