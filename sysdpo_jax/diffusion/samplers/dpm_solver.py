"""DPM-Solver++(2M): a second-order multistep solver for the estimate of z_0."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.samplers.tables import (
    Spacing,
    karras,
    noise_ratios,
    ratio_levels,
    spaced_times,
    times_of_ratios,
)
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, clean_and_noise


@dataclass(frozen=True)
class DPMSolver:
    """Algorithm 2 of arXiv 2211.01095 (midpoint form), down to clean latents; the first and last step are first-order.

    Linspace and leading spacing drop the lowest of num_steps + 1 times, as in diffusers.

    Args:
        spacing: Of the times, see `tables.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        use_karras_sigmas: Space sigma / alpha by `tables.karras` over the whole schedule.
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
        times, ratios = self._grid(schedule, num_steps)
        levels = ratio_levels(ratios)
        now, coefficients = (jnp.asarray(x, jnp.float32) for x in (levels[:-1], _coefficients(ratios, levels)))

        def step(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
            z, earlier = carry
            t, (alpha, sigma), (of_noisy, of_clean, slope) = inputs
            rows = jnp.full(z.shape[0], 1.0)
            prediction = denoise(z, jnp.full(z.shape[0], t))
            clean, _ = clean_and_noise(prediction, z, rows * alpha, rows * sigma, prediction_type)
            ahead = clean + slope * (clean - earlier)
            return (of_noisy * z + of_clean * ahead, clean), None

        (latents, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), (jnp.asarray(times), now, coefficients))
        return latents

    def _grid(self, schedule: NoiseSchedule, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Integer times [N] that the denoiser is told and the ratios sigma / alpha [N]."""
        table = noise_ratios(schedule)
        total = schedule.num_timesteps
        if self.use_karras_sigmas:
            ratios = karras(table[-1], table[0], num_steps)
            times = times_of_ratios(ratios, table)
            # diffusers cuts the fraction off under the cosine schedule and rounds under the others.
            return (times if schedule.kind == "squaredcos_cap_v2" else np.round(times)).astype(np.int32), ratios
        dropped = int(self.spacing != "trailing")
        spaced = spaced_times(self.spacing, total, num_steps + dropped, self.steps_offset)
        times = np.round(spaced[:num_steps]).astype(np.int32)
        return times, table[times]


def _coefficients(ratios: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Of z_t, of the estimate of z_0 and of its change since the step before, float64 [N, 3]."""
    alpha, sigma = levels.T
    of_noisy = sigma[1:] / sigma[:-1]
    steps = -np.diff(np.log(ratios))
    slope = np.zeros(len(ratios))
    slope[1:-1] = 0.5 * steps[1:] / steps[:-1]
    return np.stack([of_noisy, alpha[1:] - alpha[:-1] * of_noisy, slope], -1)
