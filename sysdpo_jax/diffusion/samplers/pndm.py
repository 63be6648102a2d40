"""Pseudo linear multistep sampling, the stock scheduler of Stable Diffusion 1."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.samplers.base import Denoiser
from sysdpo_jax.diffusion.samplers.tables import Spacing, spaced_times, visited_levels
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, clean_and_noise

# Adams-Bashforth weights of the newest prediction and the three before it; Heun's for the repeated first step.
_HEUN = (1 / 2, 1 / 2, 0, 0)
_ADAMS = ((1.0, 0, 0, 0), (3 / 2, -1 / 2, 0, 0), (23 / 12, -16 / 12, 5 / 12, 0), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class _Plan(NamedTuple):
    """For every call of the denoiser: where it looks, where its step begins, whether that repeats, the weights."""

    look: np.ndarray  # [N] index of the time
    begin: np.ndarray  # [N] index of the level; the step ends at the next
    again: np.ndarray  # bool [N]
    weights: np.ndarray  # [N, 4]


@dataclass(frozen=True)
class PNDM:
    """The linear multistep half of PNDM (arXiv 2202.09778, equations 9 and 12), diffusers' skip_prk_steps=True.

    The first step is taken twice, the second time with the mean of the predictions at both its ends, so num_steps
    steps, if there are two or more, call the denoiser num_steps + 1 times.

    Args:
        spacing: Of the times, see `tables.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        set_alpha_to_one: True ends at clean latents, False at the level of t = 0.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = False

    def __call__(
        self,
        denoise: Denoiser,
        noise: Float[Array, "batch *rest"],
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Float[Array, "batch *rest"]:
        """As `Sampler`, of epsilon and v_prediction models alone.

        Raises:
            ValueError: For a model that predicts z_0.
        """
        if prediction_type == "sample":
            raise ValueError("PNDM takes epsilon or v_prediction models: sample this one with DDIM or DPMSolver")
        spaced = spaced_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        times = np.round(spaced).astype(np.int32)
        levels = visited_levels(schedule, times, prediction_type, self.set_alpha_to_one)
        plan = _plan(num_steps)
        float_tables = levels[plan.begin], levels[plan.begin + 1], plan.weights
        now, after, weights = (jnp.asarray(x, jnp.float32) for x in float_tables)

        def step(
            carry: tuple[Array, Array], inputs: tuple[Array, Array, Array, Array, Array]
        ) -> tuple[tuple[Array, Array], None]:
            z, history = carry
            t, again, (alpha, sigma), (next_alpha, next_sigma), mixture = inputs
            prediction = denoise(z, jnp.full(z.shape[0], t))
            known = jnp.concatenate([prediction[None], history])
            mixed = jnp.tensordot(mixture, known, 1)
            z = jnp.where(again, noise, z)
            rows = jnp.full(z.shape[0], 1.0)
            clean, eps = clean_and_noise(mixed, z, rows * alpha, rows * sigma, prediction_type)
            return (next_alpha * clean + next_sigma * eps, jnp.where(again, history, known[:-1])), None

        carry = noise, jnp.zeros((3, *noise.shape), noise.dtype)
        inputs = jnp.asarray(times[plan.look]), jnp.asarray(plan.again), now, after, weights
        return jax.lax.scan(step, carry, inputs)[0][0]


def _plan(num_steps: int) -> _Plan:
    steps = np.arange(num_steps)
    weights = np.array(_ADAMS)[np.minimum(steps, 3)]
    if num_steps == 1:
        return _Plan(steps, steps, np.array([False]), weights)
    # The second call looks at the second time and repeats the first step.
    look, begin = np.insert(steps, 1, 1), np.insert(steps, 1, 0)
    return _Plan(look, begin, np.arange(num_steps + 1) == 1, np.insert(weights, 1, _HEUN, axis=0))
