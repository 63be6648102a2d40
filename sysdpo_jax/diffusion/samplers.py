"""Samplers that turn noise into latents with a denoising function, and classifier-free guidance.

A denoiser maps (latents [B, ...], t or flow time [B]) to a prediction of the latents' shape; guidance is part of it.
All are frozen dataclasses (static arguments of a jitted function), to be called under jit: one compilation each.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from sysdpo_jax.diffusion.levels import (
    Spacing,
    karras,
    noise_ratios,
    ratio_levels,
    spaced_times,
    times_of_ratios,
    visited_levels,
    whole_times,
)
from sysdpo_jax.diffusion.schedules import FlowSchedule, Latents, NoiseSchedule, PredictionType, clean_and_noise, expand

Denoiser = Callable[[Array, Array], Array]

# Adams-Bashforth weights of the newest prediction and the three before it; Heun's for the repeated first step.
_HEUN = (1 / 2, 1 / 2, 0, 0)
_ADAMS = ((1.0, 0, 0, 0), (3 / 2, -1 / 2, 0, 0), (23 / 12, -16 / 12, 5 / 12, 0), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


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
        noise: Latents,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Latents:
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


class Plan(NamedTuple):
    """The steps of a sampler as float64 tables: where the denoiser is called, and what the next latents are made of.

    weights: of the parts whose sum is the next latents. These are "noisy", the latents as they are, "clean" and "eps",
    the estimates of z_0 and eps, "earlier", the estimate of z_0 a step before, and "fresh", standard normal noise.
    """

    times: np.ndarray  # [N]
    levels: np.ndarray  # [N, 2] alpha and sigma of the latents
    weights: Mapping[str, np.ndarray]  # each [N]
    clip: float | None = None  # bound on the estimate of z_0
    start: float = 1.0  # the scale of the first latents


class Planned(Sampler):
    """A sampler whose steps are weighted sums, with weights that are known before the first."""

    @abstractmethod
    def plan(self, schedule: NoiseSchedule, prediction_type: PredictionType, num_steps: int) -> Plan:
        """Lay out the steps.

        Args:
            schedule: Of the noise in training.
            prediction_type: What the denoiser predicts.
            num_steps: How many.

        Returns:
            The tables.
        """

    def __call__(
        self,
        denoise: Denoiser,
        noise: Latents,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Latents:
        plan = self.plan(schedule, prediction_type, num_steps)
        levels, weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (plan.levels, dict(plan.weights)))

        def step(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], None]:
            z, earlier = carry
            t, level, of, step_key = inputs
            clean, eps = _estimates(denoise(z, jnp.full(z.shape[0], t)), z, level, prediction_type)
            clean = clean if plan.clip is None else jnp.clip(clean, -plan.clip, plan.clip)
            parts = {"noisy": z, "clean": clean, "eps": eps, "earlier": earlier}
            if "fresh" in of:
                parts["fresh"] = jax.random.normal(step_key, z.shape, z.dtype)
            return (sum((of[name] * parts[name] for name in of), start=jnp.zeros_like(z)), clean), None

        inputs = jnp.asarray(plan.times), levels, weights, jax.random.split(key, num_steps)
        return jax.lax.scan(step, (noise * plan.start, jnp.zeros_like(noise)), inputs)[0][0]


def _estimates(prediction: Array, z: Array, level: Array, prediction_type: PredictionType) -> tuple[Array, Array]:
    """Of z_0 and eps, where all rows have the same level (alpha, sigma)."""
    alpha, sigma = jnp.broadcast_to(level[:, None], (2, z.shape[0]))
    return clean_and_noise(prediction, z, alpha, sigma, prediction_type)


def _first_order(times: np.ndarray, levels: np.ndarray, clip: float | None = None, start: float = 1.0) -> Plan:
    """Exact steps through the levels [N + 1, 2] while the estimates of z_0 and eps stay as they are."""
    return Plan(times, levels[:-1], {"clean": levels[1:, 0], "eps": levels[1:, 1]}, clip, start)


@dataclass(frozen=True)
class DDIM(Planned):
    """DDIM with eta 0 (arXiv 2010.02502, equation 12), from the first of the spaced times down to clean latents.

    Args:
        clip: Bound on the estimate of z_0 at every step (for pixels in [-1, 1]: 1.0), or None.
        spacing: Of the times, see `levels.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        set_alpha_to_one: False ends at the level of t = 0 instead of at clean latents.
    """

    clip: float | None = None
    spacing: Spacing = "trailing"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    def plan(self, schedule: NoiseSchedule, prediction_type: PredictionType, num_steps: int) -> Plan:
        times = whole_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        return _first_order(times, visited_levels(schedule, times, prediction_type, self.set_alpha_to_one), self.clip)


@dataclass(frozen=True)
class Euler(Planned):
    """Algorithm 2 of arXiv 2206.00364 without added noise, down to clean latents; diffusers' EulerDiscreteScheduler.

    An Euler step of z / alpha in sigma / alpha is a DDIM step of z, so latents stay variance-preserving throughout:
    the denoiser's input needs no scaling. Times may be fractions. As in diffusers, linspace and trailing spacing scale
    the noise to the first sigma instead of to 1.

    Args:
        spacing: Of the times, see `levels.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        use_karras_sigmas: Space sigma / alpha by `levels.karras`.
    """

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False

    def plan(self, schedule: NoiseSchedule, prediction_type: PredictionType, num_steps: int) -> Plan:
        table = noise_ratios(schedule)
        times = spaced_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        ratios = np.interp(times, np.arange(len(table)), table)
        if self.use_karras_sigmas:
            ratios = karras(ratios[0], ratios[-1], num_steps)
            times = times_of_ratios(ratios, table)
        levels = ratio_levels(ratios)
        start = 1.0 if self.spacing == "leading" else float(levels[0, 1])
        return _first_order(times.astype(np.float32), levels, start=start)


@dataclass(frozen=True)
class DDPM(Planned):
    """DDPM (arXiv 2006.11239, equations 6 and 7) between the spaced times, then to clean latents.

    The last step adds no noise; diffusers adds it unless that step is at t = 0, which only matters for "fixed_large".

    Args:
        clip: Bound on the estimate of z_0 at every step, or None.
        spacing: Of the times, see `levels.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        variance_type: Of the noise, "fixed_small" the posterior's given z_0, "fixed_large" the forward process's.
    """

    clip: float | None = None
    spacing: Spacing = "leading"
    steps_offset: int = 0
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def plan(self, schedule: NoiseSchedule, prediction_type: PredictionType, num_steps: int) -> Plan:
        times = whole_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        levels = visited_levels(schedule, times, prediction_type, set_alpha_to_one=True)
        squared, kept = levels.T**2
        step_alpha = squared[:-1] / squared[1:]
        posterior = kept[1:] / kept[:-1]
        variance = (1 - step_alpha) * (posterior if self.variance_type == "fixed_small" else 1.0)
        weights = {
            "clean": levels[1:, 0] * (1 - step_alpha) / kept[:-1],
            "noisy": np.sqrt(step_alpha) * posterior,
            "fresh": np.sqrt(np.append(variance[:-1], 0.0)),
        }
        return Plan(times, levels[:-1], weights, self.clip)


@dataclass(frozen=True)
class DPMSolver(Planned):
    """DPM-Solver++(2M), a second-order multistep solver for the estimate of z_0, down to clean latents.

    Algorithm 2 of arXiv 2211.01095 (midpoint form); the first and last step are first-order. Linspace and leading
    spacing drop the lowest of num_steps + 1 times, as in diffusers.

    Args:
        spacing: Of the times, see `levels.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        use_karras_sigmas: Space sigma / alpha by `levels.karras` over the whole schedule.
    """

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False

    def plan(self, schedule: NoiseSchedule, prediction_type: PredictionType, num_steps: int) -> Plan:
        times, ratios = self._grid(schedule, num_steps)
        levels = ratio_levels(ratios)
        alpha, sigma = levels.T
        of_noisy = sigma[1:] / sigma[:-1]
        of_clean = alpha[1:] - alpha[:-1] * of_noisy
        # How far the estimate of z_0 is carried on along its change since the step before.
        steps, slope = -np.diff(np.log(ratios)), np.zeros(num_steps)
        slope[1:-1] = 0.5 * steps[1:] / steps[:-1]
        weights = {"noisy": of_noisy, "clean": of_clean * (1 + slope), "earlier": -of_clean * slope}
        return Plan(times, levels[:-1], weights)

    def _grid(self, schedule: NoiseSchedule, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Integer times [N] that the denoiser is told and the ratios sigma / alpha [N]."""
        table = noise_ratios(schedule)
        if self.use_karras_sigmas:
            ratios = karras(table[-1], table[0], num_steps)
            times = times_of_ratios(ratios, table)
            # diffusers cuts the fraction off under the cosine schedule and rounds under the others.
            return (times if schedule.kind == "squaredcos_cap_v2" else np.round(times)).astype(np.int32), ratios
        dropped = int(self.spacing != "trailing")
        times = whole_times(self.spacing, schedule.num_timesteps, num_steps + dropped, self.steps_offset)[:num_steps]
        return times, table[times]


@dataclass(frozen=True)
class PNDM(Sampler):
    """The linear multistep half of PNDM (arXiv 2202.09778, equations 9 and 12), diffusers' skip_prk_steps=True.

    The first step is taken twice, the second time with the mean of the predictions at both its ends, so num_steps
    steps, if there are two or more, call the denoiser num_steps + 1 times.

    Args:
        spacing: Of the times, see `levels.spaced_times`.
        steps_offset: Added to the times of leading spacing.
        set_alpha_to_one: True ends at clean latents, False at the level of t = 0.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = False

    def __call__(
        self,
        denoise: Denoiser,
        noise: Latents,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_steps: int,
        key: PRNGKeyArray,
    ) -> Latents:
        """As `Sampler`, of epsilon and v_prediction models alone.

        Raises:
            ValueError: For a model that predicts z_0.
        """
        if prediction_type == "sample":
            raise ValueError("PNDM takes epsilon or v_prediction models: sample this one with DDIM or DPMSolver")
        times = whole_times(self.spacing, schedule.num_timesteps, num_steps, self.steps_offset)
        levels = visited_levels(schedule, times, prediction_type, self.set_alpha_to_one)
        # Where each call of the denoiser looks, at which level its step begins, and how predictions are mixed.
        look = begin = np.arange(num_steps)
        mixtures = np.array(_ADAMS)[np.minimum(look, 3)]
        if num_steps > 1:
            # The second call looks at the second time and repeats the first step.
            look, begin, mixtures = np.insert(look, 1, 1), np.insert(begin, 1, 0), np.insert(mixtures, 1, _HEUN, axis=0)
        again = np.append(False, begin[1:] == begin[:-1])
        tables = (jnp.asarray(x, jnp.float32) for x in (levels[begin], levels[begin + 1], mixtures))

        def step(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], None]:
            z, history = carry
            t, again, level, (next_alpha, next_sigma), mixture = inputs
            known = jnp.concatenate([denoise(z, jnp.full(z.shape[0], t))[None], history])
            clean, eps = _estimates(
                jnp.tensordot(mixture, known, 1), jnp.where(again, noise, z), level, prediction_type
            )
            return (next_alpha * clean + next_sigma * eps, jnp.where(again, history, known[:-1])), None

        carry = noise, jnp.zeros((3, *noise.shape), noise.dtype)
        return jax.lax.scan(step, carry, (jnp.asarray(times[look]), jnp.asarray(again), *tables))[0][0]


@dataclass(frozen=True)
class FlowEuler:
    """Euler steps of dz/dsigma = velocity from sigma = 1 (noise) to 0 (data), arXiv 2209.03003.

    Args:
        schedule: Which times are visited.
        spacing: Of the times before the shift. "trailing" is even, 1, (N - 1) / N, ..., 1 / N; "linspace" runs from 1
            to the least time of FlowMatchEulerDiscreteScheduler, which diffusers has then already shifted once.
    """

    schedule: FlowSchedule = FlowSchedule()
    spacing: Literal["trailing", "linspace"] = "trailing"

    def __call__(self, denoise: Denoiser, noise: Latents, num_steps: int, key: PRNGKeyArray) -> Latents:
        """Turn noise into latents.

        Args:
            denoise: (latents, noise level sigma in [0, 1] of each row) -> velocity.
            noise: Standard normal.
            num_steps: Calls of the denoiser.
            key: Not used.

        Returns:
            The latents.

        Raises:
            ValueError: When there is no step to take.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        first = np.array([1 / self.schedule.num_train_timesteps])
        least = self.schedule.sigma(first)[0] if self.spacing == "linspace" else 1 / num_steps
        sigmas = np.append(self.schedule.sigma(np.linspace(1.0, least, num_steps)), 0.0)

        def step(z: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
            now, after = interval
            rows = jnp.full(z.shape[0], now)
            return z + expand(jnp.full(z.shape[0], after - now), z) * denoise(z, rows), None

        levels = jnp.asarray(sigmas, jnp.float32)
        return jax.lax.scan(step, noise, (levels[:-1], levels[1:]))[0]
