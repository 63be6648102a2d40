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
    """Discrete-time diffusion, trained at t ~ U{low, ..., high - 1} (arXiv 2311.12908, equation 14).

    log p(image | caption) ~= -(T omega / 2) * mean squared error of the prediction at one draw of (t, noise).

    Args:
        denoiser: Module (latents [B, h, w, c], time [B], *conditioning) -> prediction [B, h, w, c].
        text: Captions to the conditioning; trained with the denoiser unless it is `FrozenText`.
        codec: Images (paths, bytes, PIL images, arrays) to latents and back.
        num_steps: Of the sampler.
        guidance_scale: Of the sampler; at most 1 means no guidance.
        negative_prompt: What guidance leads away from; None is the null condition.
        caption_dropout: Share of rows whose caption is replaced by the null condition in `log_prob`, for guidance.
        strata: Rows come in groups of this many whose times are spread evenly (set it to the node's plate).
        source: The files that it was read from, which `pretrained.save` hands on.
        schedule: Of the noise.
        prediction_type: "epsilon", "v_prediction" or "sample".
        weighting: T * omega(lambda_t), see `sysdpo_jax.diffusion`.
        timesteps: The range (low, high) of t; (0, num_timesteps) by default. A narrower one departs from the paper.
        sampler: From noise to latents, see `sysdpo_jax.diffusion`.

    Raises:
        ValueError: For a value out of range, and an epsilon model that would be trained where the SNR is 0.
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
