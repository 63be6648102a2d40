"""Deterministic DDIM: the exact step between two noise levels when the estimates of z_0 and eps stay as they are."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.samplers.tables import Spacing, spaced_times, visited_levels
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, clean_and_noise


@dataclass(frozen=True)
class DDIM:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12), from the first of the spaced times down to clean latents.

    Args:
        clip: Bound on the estimate of z_0 at every step (for pixels in [-1, 1]: 1.0), or None.
        spacing: Of the times, see `tables.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        set_alpha_to_one: False ends at the level of t = 0 instead of at clean latents.
    """

    clip: float | None = None
    spacing: Spacing = "trailing"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

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
        levels = visited_levels(schedule, times, prediction_type, self.set_alpha_to_one)
        return first_order(denoise, noise, times, levels, prediction_type, self.clip)


def first_order(
    denoise: Denoiser,
    start: Float[Array, "batch *rest"],
    times: np.ndarray,
    levels: np.ndarray,
    prediction_type: PredictionType,
    clip: float | None = None,
) -> Float[Array, "batch *rest"]:
    """DDIM steps through the levels (alpha, sigma) [N + 1, 2]; the denoiser sees times [N]."""
    table = jnp.asarray(levels, jnp.float32)

    def step(z: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, (alpha, sigma), (next_alpha, next_sigma) = inputs
        rows = jnp.full(z.shape[0], 1.0)
        prediction = denoise(z, jnp.full(z.shape[0], t))
        clean, eps = clean_and_noise(prediction, z, rows * alpha, rows * sigma, prediction_type)
        if clip is not None:
            clean = jnp.clip(clean, -clip, clip)
        return next_alpha * clean + next_sigma * eps, None

    return jax.lax.scan(step, start, (jnp.asarray(times), table[:-1], table[1:]))[0]
