"""Euler steps along a rectified flow."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.schedules import FlowSchedule, expand


@dataclass(frozen=True)
class FlowEuler:
    """Euler steps of dz/dsigma = velocity from sigma = 1 (noise) to 0 (data), arXiv 2209.03003.

    Args:
        schedule: Which times are visited.
        spacing: Of the times before the shift. "trailing" is even, 1, (N - 1) / N, ..., 1 / N; "linspace" runs from 1
            to the least time of FlowMatchEulerDiscreteScheduler, which diffusers has then already shifted once.
    """

    schedule: FlowSchedule = FlowSchedule()
    spacing: Literal["trailing", "linspace"] = "trailing"

    def __call__(
        self, denoise: Denoiser, noise: Float[Array, "batch *rest"], num_steps: int, key: PRNGKeyArray
    ) -> Float[Array, "batch *rest"]:
        """Turn noise into latents.

        Args:
            denoise: (latents, noise level sigma in [0, 1] of each row) -> velocity.
            noise: Standard normal.
            num_steps: Calls of the denoiser.
            key: Not used.

        Returns:
            The latents.

        Raises:
            ValueError: When there is no step to take.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        first = np.array([1 / self.schedule.num_train_timesteps])
        least = self.schedule.sigma(first)[0] if self.spacing == "linspace" else 1 / num_steps
        sigmas = np.append(self.schedule.sigma(np.linspace(1.0, least, num_steps)), 0.0)

        def step(z: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
            now, after = interval
            rows = jnp.full(z.shape[0], now)
            return z + expand(jnp.full(z.shape[0], after - now), z) * denoise(z, rows), None

        levels = jnp.asarray(sigmas, jnp.float32)
        return jax.lax.scan(step, noise, (levels[:-1], levels[1:]))[0]
