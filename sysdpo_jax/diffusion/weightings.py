"""Weightings T * omega(lambda_t) of a denoising error, so that log p ~= -(T omega / 2) * mean squared error.

All of them are in the MEAN-error convention: the error is averaged over the latent's elements, as in public
Diffusion-DPO code. A sum over elements is a weight larger by the number of elements. The error is that of the model's
own prediction type (eps, v or z_0).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType
from sysdpo_jax.typing import Rows

Times = Int[Array, "batch"]


@runtime_checkable
class Weighting(Protocol):
    """T * omega of a denoising error, so that log p ~= -(T omega / 2) * mean squared error."""

    def __call__(self, schedule: NoiseSchedule, t: Times, prediction_type: PredictionType, size: int) -> Rows:
        """Weigh the error of each row.

        Args:
            schedule: Of the noise.
            t: The row's timestep.
            prediction_type: What the error is of.
            size: Elements of one latent.

        Returns:
            T * omega for each row.
        """
        ...


@dataclass(frozen=True)
class Constant:
    """The same weight at every timestep: the public Diffusion-DPO recipe (arXiv 2311.12908, below equation 14).

    Args:
        scale: T * omega. Diffusion-DPO's 5000 contains its beta; with a system beta of 0.1 the same loss has scale
            50,000.
    """

    scale: float = 50_000.0

    def __call__(self, schedule: NoiseSchedule, t: Times, prediction_type: PredictionType, size: int) -> Rows:
        return jnp.full(t.shape, self.scale)


@dataclass(frozen=True)
class MinSNR:
    """scale * min(SNR, gamma) on the z_0 error, carried over to the prediction type (arXiv 2303.09556, section 3.4).

    Args:
        scale: T * omega where the SNR is 1.
        gamma: The largest SNR that counts.
    """

    scale: float = 50_000.0
    gamma: float = 5.0

    def __call__(self, schedule: NoiseSchedule, t: Times, prediction_type: PredictionType, size: int) -> Rows:
        snr = schedule.snr()
        capped = np.minimum(snr, self.gamma)
        # min(SNR, gamma) / SNR is written so that it is 1, not 0 / 0, where the SNR is 0.
        on = {"epsilon": self.gamma / np.maximum(snr, self.gamma), "v_prediction": capped / (snr + 1), "sample": capped}
        return jnp.asarray(self.scale * on[prediction_type], jnp.float32)[t]


@dataclass(frozen=True)
class ELBO:
    """The exact weight of step t in the variational bound, T (SNR(t-1) - SNR(t)) on the summed z_0 error.

    arXiv 2107.00630, equation 13; a single t drawn evenly stands for the sum. Step 0 has no predecessor and weight 0:
    its reconstruction term is left out, so log-ratios are those of latents at the lowest noise level.
    On an epsilon error it is infinite where the SNR is 0: `Diffusion` refuses to train such a model at that step.
    """

    def __call__(self, schedule: NoiseSchedule, t: Times, prediction_type: PredictionType, size: int) -> Rows:
        snr = schedule.snr()
        on_clean = np.append(0.0, snr[:-1] - snr[1:])
        clean_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr)}[prediction_type]
        with np.errstate(divide="ignore"):
            return jnp.asarray(schedule.num_timesteps * size * on_clean / clean_error, jnp.float32)[t]
