"""Euler steps of the probability-flow ODE in the ratio sigma / alpha."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.samplers.ddim import first_order
from sysdpo_jax.diffusion.samplers.tables import (
    Spacing,
    karras,
    noise_ratios,
    ratio_levels,
    spaced_times,
    times_of_ratios,
)
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class Euler:
    """Algorithm 2 of arXiv 2206.00364 without added noise, down to clean latents; diffusers' EulerDiscreteScheduler.

    An Euler step of z / alpha in sigma / alpha is a DDIM step of z, so latents stay variance-preserving throughout:
    the denoiser's input needs no scaling. Times may be fractions. As in diffusers, linspace and trailing spacing scale
    the noise to the first sigma instead of to 1.

    Args:
        spacing: Of the times, see `tables.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        use_karras_sigmas: Space sigma / alpha by `tables.karras`.
    """

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False

    def __call__(
        self,
        denoise: Denoiser,
        noise: Float[Array, "batch *rest"],
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Float[Array, "batch *rest"]:
        table = noise_ratios(schedule)
        times = spaced_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        ratios = np.interp(times, np.arange(len(table)), table)
        if self.use_karras_sigmas:
            ratios = karras(ratios[0], ratios[-1], num_steps)
            times = times_of_ratios(ratios, table)
        levels = ratio_levels(ratios)
        start = noise if self.spacing == "leading" else noise * float(levels[0, 1])
        return first_order(denoise, start, times.astype(np.float32), levels, prediction_type)
