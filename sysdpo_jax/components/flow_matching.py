"""Rectified flow: the surrogate of Diffusion-DPO with the velocity as target."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.text_to_image import Corrupted, TextToImage
from sysdpo_jax.diffusion.samplers import Denoiser, FlowEuler
from sysdpo_jax.diffusion.schedules import expand


@dataclass(frozen=True, kw_only=True)
class FlowMatching(TextToImage):
    """z = (1 - sigma) z_0 + sigma eps with the velocity eps - z_0 as target (arXiv 2209.03003, equation 1).

    Args:
        denoiser: Module (latents [B, h, w, c], time [B], *conditioning) -> velocity [B, h, w, c].
        text: Captions to the conditioning; trained with the denoiser unless it is `FrozenText`.
        codec: Images (paths, bytes, PIL images, arrays) to latents and back.
        num_steps: Of the sampler.
        guidance_scale: Of the sampler; at most 1 means no guidance.
        negative_prompt: What guidance leads away from; None is the null condition.
        caption_dropout: Share of rows whose caption is replaced by the null condition in `log_prob`, for guidance.
        strata: Rows come in groups of this many whose times are spread evenly (set it to the node's plate).
        source: The files that it was read from, which `pretrained.save` hands on.
        sampler: Euler steps, and the schedule that gives the level sigma(u) at u ~ U[0, 1) in training too.
        scale: T * omega, the weight of the mean squared velocity error.
    """

    sampler: FlowEuler = FlowEuler()
    scale: float = 50_000.0

    def corrupt(
        self, clean: Float[Array, "batch h w c"], noise: Float[Array, "batch h w c"], u: Float[Array, "batch"]
    ) -> Corrupted:
        level = self.sampler.schedule.sigma(u)
        t = expand(level, clean)
        return Corrupted((1 - t) * clean + t * noise, self._time(level), noise - clean, jnp.full(u.shape, self.scale))

    def denoise(
        self, predict: Denoiser, noise: Float[Array, "batch h w c"], key: PRNGKeyArray
    ) -> Float[Array, "batch h w c"]:
        return self.sampler(lambda z, level: predict(z, self._time(level)), noise, self.num_steps, key)

    def _time(self, level: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """What the denoiser is told of the noise level."""
        return level * self.sampler.schedule.num_train_timesteps
