"""A diffusion model: its log-probability is the Diffusion-DPO surrogate (arXiv 2311.12908)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.text_to_image import Corrupted, TextToImage
from sysdpo_jax.diffusion.samplers import DDIM, Denoiser, Sampler
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, add_noise, target
from sysdpo_jax.diffusion.weightings import Constant, Weighting


@dataclass(frozen=True, kw_only=True)
class Diffusion(TextToImage):
    """Discrete-time diffusion, trained at t ~ U{low, ..., high - 1}.

    prediction_type: "epsilon", "v_prediction" or "sample".
    weighting: T * omega(lambda_t), see generation/weightings.py.
    timesteps: the range (low, high) of t; (0, num_timesteps) by default. A narrower one departs from the paper.
    sampler: from noise to latents, see generation/samplers.
    """

    schedule: NoiseSchedule = NoiseSchedule()
    prediction_type: PredictionType = "epsilon"
    weighting: Weighting = Constant()
    timesteps: tuple[int, int] | None = None
    sampler: Sampler = DDIM()

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._range
        if not 0 <= low < high <= self.schedule.num_timesteps:
            raise ValueError(f"timesteps {self.timesteps} must lie within (0, {self.schedule.num_timesteps})")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction_type {self.prediction_type!r}: epsilon, v_prediction or sample")
        if self.prediction_type == "epsilon" and high == self.schedule.num_timesteps and self.schedule.snr()[-1] == 0:
            raise ValueError(
                "an epsilon model says nothing of z_0 where the SNR is 0: use v_prediction with "
                f"rescale_betas_zero_snr, or timesteps=(0, {high - 1})"
            )

    @property
    def _range(self) -> tuple[int, int]:
        return self.timesteps or (0, self.schedule.num_timesteps)

    def corrupt(
        self, clean: Float[Array, "batch h w c"], noise: Float[Array, "batch h w c"], u: Float[Array, "batch"]
    ) -> Corrupted:
        low, high = self._range
        t = low + jnp.floor(u * (high - low)).astype(jnp.int32)
        alpha, sigma = self.schedule.alpha_sigma(t)
        answer = target(clean, noise, alpha, sigma, self.prediction_type)
        weight = self.weighting(self.schedule, t, self.prediction_type, clean[0].size)
        return Corrupted(add_noise(clean, noise, alpha, sigma), t, answer, weight)

    def denoise(
        self, predict: Denoiser, noise: Float[Array, "batch h w c"], key: PRNGKeyArray
    ) -> Float[Array, "batch h w c"]:
        return self.sampler(predict, noise, self.schedule, self.prediction_type, self.num_steps, key)
