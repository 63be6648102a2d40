"""Ancestral sampling: the reverse process of the diffusion, with noise of its own at every step but the last."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.samplers.tables import Spacing, spaced_times, visited_levels
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, clean_and_noise


@dataclass(frozen=True)
class DDPM:
    """DDPM (arXiv 2006.11239, equations 6 and 7) between the spaced times, then to clean latents.

    The last step adds no noise; diffusers adds it unless that step is at t = 0, which only matters for "fixed_large".

    Args:
        clip: Bound on the estimate of z_0 at every step, or None.
        spacing: Of the times, see `tables.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        variance_type: Of the noise, "fixed_small" the posterior's given z_0, "fixed_large" the forward process's.
    """

    clip: float | None = None
    spacing: Spacing = "leading"
    steps_offset: int = 0
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def __call__(
        self,
        denoise: Denoiser,
        noise: Float[Array, "batch *rest"],
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Float[Array, "batch *rest"]:
        spaced = spaced_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        times = np.round(spaced).astype(np.int32)
        levels = visited_levels(schedule, times, prediction_type, set_alpha_to_one=True)
        now, coefficients = jnp.asarray(levels[:-1], jnp.float32), jnp.asarray(self._coefficients(levels), jnp.float32)

        def step(z: Array, inputs: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
            t, (alpha, sigma), (of_clean, of_noisy, deviation), step_key = inputs
            rows = jnp.full(z.shape[0], 1.0)
            prediction = denoise(z, jnp.full(z.shape[0], t))
            clean, _ = clean_and_noise(prediction, z, rows * alpha, rows * sigma, prediction_type)
            if self.clip is not None:
                clean = jnp.clip(clean, -self.clip, self.clip)
            fresh = jax.random.normal(step_key, z.shape, z.dtype)
            return of_clean * clean + of_noisy * z + deviation * fresh, None

        inputs = jnp.asarray(times), now, coefficients, jax.random.split(key, num_steps)
        return jax.lax.scan(step, noise, inputs)[0]

    def _coefficients(self, levels: np.ndarray) -> np.ndarray:
        """Of z_0, of z_t and of the fresh noise at every step, float64 [N, 3]."""
        squared, kept = levels[:, 0] ** 2, levels[:, 1] ** 2
        step_alpha = squared[:-1] / squared[1:]
        posterior = kept[1:] / kept[:-1]
        of_clean = levels[1:, 0] * (1 - step_alpha) / kept[:-1]
        of_noisy = np.sqrt(step_alpha) * posterior
        variance = (1 - step_alpha) * (posterior if self.variance_type == "fixed_small" else 1.0)
        return np.stack([of_clean, of_noisy, np.sqrt(np.append(variance[:-1], 0.0))], -1)
