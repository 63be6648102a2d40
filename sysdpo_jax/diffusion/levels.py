"""The times and noise levels that samplers visit: tables in float64, computed on the host."""

from typing import Literal

import numpy as np

from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType

Spacing = Literal["leading", "trailing", "linspace"]


def spaced_times(spacing: Spacing, total: int, num_steps: int, steps_offset: int) -> np.ndarray:
    """num_steps falling times in [0, total - 1], float64: arXiv 2305.08891, table 2, with diffusers' names.

    "leading": multiples of total // num_steps, raised by steps_offset; the last time, pure noise, is not visited.
    "trailing": down from total - 1, rounded. "linspace": from total - 1 to 0, both included, NOT rounded.
    Raises ValueError when they do not fit in the schedule.
    """
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps={num_steps} must lie within 1 and the schedule's {total} timesteps")
    if spacing == "linspace":
        return np.linspace(0, total - 1, num_steps)[::-1]
    if spacing == "trailing":
        # Rounding may give arange one element too many, which would be the time -1.
        return np.round(np.arange(total, 0, -total / num_steps)[:num_steps]) - 1
    if spacing != "leading":
        raise ValueError(f"unknown timestep spacing {spacing!r}: leading, trailing or linspace")
    times = np.arange(num_steps)[::-1] * float(total // num_steps) + steps_offset
    if times[0] > total - 1:
        raise ValueError(
            f"{num_steps} steps with leading spacing and steps_offset={steps_offset} begin at t={times[0]:g}, beyond "
            f"the last timestep {total - 1}: take fewer steps or another spacing"
        )
    return times


def whole_times(spacing: Spacing, total: int, num_steps: int, steps_offset: int) -> np.ndarray:
    """`spaced_times` rounded, int32."""
    return np.round(spaced_times(spacing, total, num_steps, steps_offset)).astype(np.int32)


def visited_levels(
    schedule: NoiseSchedule, times: np.ndarray, prediction_type: PredictionType, set_alpha_to_one: bool
) -> np.ndarray:
    """(alpha, sigma) at integer times [N] and after the last of them, float64 [N + 1, 2].

    set_alpha_to_one: the end is clean latents (1, 0), otherwise the level of t = 0.
    Raises ValueError for an epsilon model whose first alpha is 0.
    """
    squared = schedule.alphas_cumprod()
    visited = np.append(squared[times], 1.0 if set_alpha_to_one else squared[0])
    if prediction_type == "epsilon" and visited[0] == 0:
        raise ValueError(
            f"an epsilon prediction says nothing of the clean latents at t={times[0]}, where rescale_betas_zero_snr "
            "leaves an SNR of 0: use a v_prediction or sample model, or leading spacing"
        )
    return np.sqrt(np.stack([visited, 1.0 - visited], -1))


def noise_ratios(schedule: NoiseSchedule) -> np.ndarray:
    """sigma_t / alpha_t for every t, float64 [num_timesteps]; like diffusers, an alpha^2 of 0 is taken as 2^-24."""
    squared = schedule.alphas_cumprod()
    if squared[-1] == 0:
        squared[-1] = 2.0**-24
    return np.sqrt((1.0 - squared) / squared)


def ratio_levels(ratios: np.ndarray) -> np.ndarray:
    """(alpha, sigma) [N + 1, 2] with these ratios sigma / alpha [N] and then clean latents, variance preserved."""
    alpha = 1.0 / np.sqrt(np.append(ratios, 0.0) ** 2 + 1.0)
    return np.stack([alpha, np.append(ratios, 0.0) * alpha], -1)


def karras(first: float, last: float, num_steps: int) -> np.ndarray:
    """Ratios from first to last, spaced evenly in their seventh root (arXiv 2206.00364, equation 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), num_steps) ** 7


def times_of_ratios(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The fractional times at which the schedule's `noise_ratios` have these values, linear in their logarithm."""
    return np.interp(np.log(ratios), np.log(table), np.arange(len(table)))
