"""Weightings T * omega(lambda_t) of a denoising error, so that log p ~= -(T omega / 2) * mean squared error.

All of them are in the MEAN-error convention: the error is averaged over the latent's elements, as in public
Diffusion-DPO code. A sum over elements is a weight larger by the number of elements. The error is that of the model's
own prediction type (eps, v or z_0).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.generation.schedules import NoiseSchedule, PredictionType


@runtime_checkable
class Weighting(Protocol):
    """T * omega for each row's timestep; `size` is the number of elements of one latent."""

    def __call__(
        self, schedule: NoiseSchedule, t: Int[Array, "batch"], prediction_type: PredictionType, size: int
    ) -> Float[Array, "batch"]: ...


@dataclass(frozen=True)
class Constant:
    """The same weight at every timestep: the public Diffusion-DPO recipe (arXiv 2311.12908, below equation 14).

    scale: T * omega. Diffusion-DPO's 5000 contains its beta; with a system beta of 0.1 the same loss has scale 50,000.
    """

    scale: float = 50_000.0

    def __call__(
        self, schedule: NoiseSchedule, t: Int[Array, "batch"], prediction_type: PredictionType, size: int
    ) -> Float[Array, "batch"]:
        return jnp.full(t.shape, self.scale)


@dataclass(frozen=True)
class MinSNR:
    """scale * min(SNR, gamma) on the z_0 error, carried over to the prediction type (arXiv 2303.09556, section 3.4)."""

    scale: float = 50_000.0
    gamma: float = 5.0

    def __call__(
        self, schedule: NoiseSchedule, t: Int[Array, "batch"], prediction_type: PredictionType, size: int
    ) -> Float[Array, "batch"]:
        snr = jnp.exp(schedule.log_snr(t))
        to_clean = {"epsilon": 1.0 / snr, "v_prediction": 1.0 / (snr + 1.0), "sample": jnp.ones_like(snr)}
        return self.scale * jnp.minimum(snr, self.gamma) * to_clean[prediction_type]


@dataclass(frozen=True)
class ELBO:
    """The exact weight of step t in the variational bound, T (SNR(t-1) - SNR(t)) on the summed z_0 error.

    arXiv 2107.00630, equation 13; a single t drawn evenly stands for the sum. Step 0 has no predecessor and weight 0:
    its reconstruction term is left out, so log-ratios are those of latents at the lowest noise level.
    """

    def __call__(
        self, schedule: NoiseSchedule, t: Int[Array, "batch"], prediction_type: PredictionType, size: int
    ) -> Float[Array, "batch"]:
        now = schedule.log_snr(t)
        # On the eps error the difference of SNRs is exp(lambda_{t-1} - lambda_t) - 1, which never overflows.
        on_noise = jnp.where(t > 0, jnp.expm1(schedule.log_snr(jnp.maximum(t - 1, 0)) - now), 0.0)
        alpha, _ = schedule.alpha_sigma(t)
        from_noise = {"epsilon": jnp.ones_like(now), "v_prediction": alpha**2, "sample": jnp.exp(now)}
        return schedule.num_timesteps * size * on_noise * from_noise[prediction_type]
