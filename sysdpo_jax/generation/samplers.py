"""Samplers that turn noise into latents with a denoising function. Each is a pure function, meant to run under jit.

A denoiser maps (latents [B, ...], t or flow time [B]) to a prediction of the latents' shape; guidance is part of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sysdpo_jax.generation.schedules import NoiseSchedule, PredictionType, clean_and_noise, expand

Denoiser = Callable[[Array, Array], Array]


def guided(denoise: Callable[[Array, Array, Array], Array], cond: Array, uncond: Array, scale: float) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), both halves in one forward pass (arXiv 2207.12598).

    `denoise` also takes the conditioning [B, ...]. At scale 1 the unconditional half is left out.
    """
    if scale == 1.0:
        return lambda z, t: denoise(z, t, cond)
    both = jnp.concatenate([uncond, cond])

    def predict(z: Array, t: Array) -> Array:
        out_uncond, out_cond = jnp.split(denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), both), 2)
        return out_uncond + scale * (out_cond - out_uncond)

    return predict


def ddim(
    denoise: Denoiser,
    noise: Float[Array, "batch *rest"],
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    num_steps: int,
    clip: float | None = None,
) -> Float[Array, "batch *rest"]:
    """Deterministic DDIM (arXiv 2010.02502, equation 12 with eta 0) from t = T - 1 down to clean latents.

    num_steps timesteps are spaced evenly with the last one included (diffusers' "trailing" spacing).
    clip: bound on the estimate of z_0 at every step (for pixels in [-1, 1]: 1.0), or None.
    """
    total = schedule.num_timesteps
    times = np.round(np.arange(total, 0, -total / num_steps)).astype(np.int32) - 1
    squared = schedule.alphas_cumprod()
    now = jnp.asarray(np.sqrt(np.stack([squared[times], 1 - squared[times]], -1)), jnp.float32)
    # The last step lands on clean latents: alpha 1, sigma 0.
    after = jnp.concatenate([now[1:], jnp.array([[1.0, 0.0]])])

    def step(z: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, (alpha, sigma), (next_alpha, next_sigma) = inputs
        rows = jnp.full(z.shape[0], 1.0)
        prediction = denoise(z, jnp.full(z.shape[0], t))
        clean, eps = clean_and_noise(prediction, z, rows * alpha, rows * sigma, prediction_type)
        if clip is not None:
            clean = jnp.clip(clean, -clip, clip)
        return next_alpha * clean + next_sigma * eps, None

    return jax.lax.scan(step, noise, (jnp.asarray(times), now, after))[0]


def flow_euler(denoise: Denoiser, noise: Float[Array, "batch *rest"], num_steps: int) -> Float[Array, "batch *rest"]:
    """Euler steps of dz/dt = velocity from t = 1 (noise) to t = 0 (data) on the rectified flow (arXiv 2209.03003)."""
    times = jnp.linspace(1.0, 0.0, num_steps + 1)

    def step(z: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
        now, after = interval
        rows = jnp.full(z.shape[0], now)
        return z + expand(jnp.full(z.shape[0], after - now), z) * denoise(z, rows), None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]
