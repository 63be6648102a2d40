"""What a sampler is, and classifier-free guidance.

A denoiser maps (latents [B, ...], t or flow time [B]) to a prediction of the latents' shape; guidance is part of it.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType

Denoiser = Callable[[Array, Array], Array]


@runtime_checkable
class Sampler(Protocol):
    """From standard normal noise to latents, on the schedule the denoiser was trained on.

    Only samplers that draw noise of their own use the key. Where num_steps does not divide the schedule's length,
    diffusers lands between the times it visits next; here every step ends at the time where the next one begins. Where
    the SNR is 0, z_0 does not follow from eps: DDIM, DDPM and PNDM raise ValueError there, Euler and DPMSolver take an
    SNR of 2^-24 instead, as diffusers does.
    """

    def __call__(
        self,
        denoise: Denoiser,
        noise: Float[Array, "batch *rest"],
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Float[Array, "batch *rest"]:
        """Turn noise into latents.

        Args:
            denoise: (latents, time of each row) -> prediction.
            noise: Standard normal.
            schedule: Of the noise in training.
            prediction_type: What the denoiser predicts.
            num_steps: Steps of the sampler.
            key: Of the sampler's own noise.

        Returns:
            The latents.

        Raises:
            ValueError: When the schedule has no num_steps such times.
        """
        ...


def guides(scale: float) -> bool:
    """Whether there is guidance at all: above 1 only, as in diffusers.

    The cards of distilled models (SDXL-Turbo, Stable Diffusion 3.5 Large Turbo) ask for 0.0 and mean the conditional
    prediction alone, not the unconditional one that the formula of `guided` would give there.
    """
    return scale > 1.0


def guided(
    denoise: Callable[..., Array], cond: tuple[Array, ...], uncond: tuple[Array, ...] | None, scale: float
) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), both halves in one forward pass (arXiv 2207.12598).

    `denoise` also takes the conditioning, arrays [B, ...] after the time. At a scale that does not guide (`guides`)
    the unconditional half is left out, and uncond may be None. Raises ValueError when it is None at another scale.
    """
    if not guides(scale):
        return lambda z, t: denoise(z, t, *cond)
    if uncond is None:
        raise ValueError(f"guided: scale {scale} needs the unconditional conditioning; at most 1 goes without")
    both = jax.tree.map(lambda *halves: jnp.concatenate(halves), uncond, cond)

    def predict(z: Array, t: Array) -> Array:
        out_uncond, out_cond = jnp.split(denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), *both), 2)
        return out_uncond + scale * (out_cond - out_uncond)

    return predict
