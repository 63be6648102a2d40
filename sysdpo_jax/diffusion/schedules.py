"""Noise schedules and prediction-type algebra: plain functions without a model.

The forward process is z_t = alpha_t z_0 + sigma_t eps, t an integer in [0, num_timesteps); t = 0 is the least noise.
Axes: B batch; the per-row coefficients broadcast against latents [B, ...].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sysdpo_jax.typing import Rows

Latents = Float[Array, "batch *rest"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
# On the device, or on the host for tables.
Times = TypeVar("Times", Array, np.ndarray)


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule, named as in diffusers: alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2.

    Args:
        kind: "linear" and "scaled_linear" space beta or sqrt(beta) evenly from beta_start to beta_end;
            "squaredcos_cap_v2" is the cosine schedule of arXiv 2102.09672, equation 17.
        num_timesteps: T.
        beta_start: The first beta.
        beta_end: The last beta.
        rescale_betas_zero_snr: Shift and scale alpha_t so that the last one is 0 and the first stays (arXiv 2305.08891,
            algorithm 1). The last z_t is then pure noise: its log-SNR is -inf and an epsilon prediction says nothing of
            z_0.
    """

    kind: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False

    def betas(self) -> np.ndarray:
        """beta_t for every t.

        Returns:
            float64 [num_timesteps].

        Raises:
            ValueError: On an unknown kind.
        """
        makers: dict[str, Callable[[], np.ndarray]] = {
            "linear": lambda: np.linspace(self.beta_start, self.beta_end, self.num_timesteps),
            "scaled_linear": lambda: np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2,
            "squaredcos_cap_v2": lambda: _cosine_betas(self.num_timesteps),
        }
        if self.kind not in makers:
            raise ValueError(f"unknown noise schedule {self.kind!r}: choose one of {', '.join(makers)}")
        betas = makers[self.kind]()
        return _zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    def alphas_cumprod(self) -> np.ndarray:
        """alpha_t^2 for every t.

        Returns:
            float64 [num_timesteps]; the last is exactly 0 with rescale_betas_zero_snr.
        """
        return np.cumprod(1.0 - self.betas())

    def snr(self) -> np.ndarray:
        """SNR_t = alpha_t^2 / sigma_t^2 for every t.

        Returns:
            float64 [num_timesteps].
        """
        squared = self.alphas_cumprod()
        return squared / (1.0 - squared)

    def alpha_sigma(self, t: Int[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """The levels of signal and noise.

        Args:
            t: Timesteps.

        Returns:
            alpha_t and sigma_t in float32.
        """
        squared = self.alphas_cumprod()
        alpha, sigma = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (squared, 1.0 - squared))
        return alpha[t], sigma[t]


@dataclass(frozen=True)
class FlowSchedule:
    """A rectified flow z = (1 - sigma) z_0 + sigma eps whose times are shifted towards the noise.

    Args:
        shift: 1 leaves the times as they are; Stable Diffusion 3 has 3.0 (arXiv 2403.03206, equation 23).
        num_train_timesteps: The model is given sigma * num_train_timesteps.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def sigma(self, u: Times) -> Times:
        """The noise level: shift u / (1 + (shift - 1) u).

        Args:
            u: Unshifted times in [0, 1], any shape.

        Returns:
            sigma, of the same shape.
        """
        return self.shift * u / (1 + (self.shift - 1) * u)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    squared = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1.0 - squared / np.append(1.0, squared[:-1])


def _cosine_betas(steps: int) -> np.ndarray:
    level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - level[1:] / level[:-1], 0.999)


def expand(rows: Rows, like: Latents) -> Float[Array, "batch *ones"]:
    """Per-row coefficients shaped to broadcast against `like`."""
    return rows.reshape(rows.shape[0], *(1,) * (like.ndim - 1))


def add_noise(clean: Latents, noise: Latents, alpha: Rows, sigma: Rows) -> Latents:
    """z_t = alpha_t z_0 + sigma_t eps."""
    return expand(alpha, clean) * clean + expand(sigma, clean) * noise


def target(clean: Latents, noise: Latents, alpha: Rows, sigma: Rows, prediction_type: PredictionType) -> Latents:
    """What the model is trained to output: eps, v = alpha eps - sigma z_0 (arXiv 2202.00512, appendix D) or z_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return expand(alpha, clean) * noise - expand(sigma, clean) * clean
    return clean


def clean_and_noise(
    prediction: Latents, noisy: Latents, alpha: Rows, sigma: Rows, prediction_type: PredictionType
) -> tuple[Latents, Latents]:
    """The estimates of z_0 and eps that a prediction implies.

    An epsilon prediction divides by alpha and a z_0 prediction by sigma: callers see to it that neither is 0.
    """
    a, s = expand(alpha, noisy), expand(sigma, noisy)
    if prediction_type == "epsilon":
        return (noisy - s * prediction) / a, prediction
    if prediction_type == "v_prediction":
        return a * noisy - s * prediction, s * noisy + a * prediction
    return prediction, (noisy - a * prediction) / s
