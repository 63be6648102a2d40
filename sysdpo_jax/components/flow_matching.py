"""Rectified flow: the surrogate of Diffusion-DPO with the velocity as target."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.components.text_to_image import Corrupted, TextToImage
from sysdpo_jax.generation.samplers import Denoiser, flow_euler
from sysdpo_jax.generation.schedules import expand


@dataclass(frozen=True, kw_only=True)
class FlowMatching(TextToImage):
    """z_t = (1 - t) z_0 + t eps with t ~ U[0, 1), velocity eps - z_0 (arXiv 2209.03003, equation 1); Euler sampling.

    scale: T * omega, the weight of the mean squared velocity error. The denoiser is given t * time_scale.
    """

    scale: float = 50_000.0
    time_scale: float = 1000.0

    def corrupt(
        self, clean: Float[Array, "batch h w c"], noise: Float[Array, "batch h w c"], u: Float[Array, "batch"]
    ) -> Corrupted:
        t = expand(u, clean)
        return Corrupted((1 - t) * clean + t * noise, u * self.time_scale, noise - clean, jnp.full(u.shape, self.scale))

    def denoise(self, predict: Denoiser, noise: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return flow_euler(lambda z, t: predict(z, t * self.time_scale), noise, self.num_steps)
