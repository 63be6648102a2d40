"""Whole trajectories against diffusers' schedulers, with the same denoiser written in both frameworks.

Tolerance 2e-5 of the largest latent (1 to 36): float32 rounding over at most 48 steps on both sides, with diffusers'
tables in float32 and ours in float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule

NOISE = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
KEY = jax.random.key(7)
TOLERANCE = 2e-5
SCHEDULE = NoiseSchedule()
TYPES = ("epsilon", "v_prediction", "sample")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Every spacing with numbers of steps that divide 1000 and with others.
STEPS = {"leading": (1, 7, 48), "trailing": (1, 7, 20), "linspace": (2, 20)}
GRIDS = [(spacing, steps) for spacing, counts in STEPS.items() for steps in counts]
# The times do not depend on what the model predicts: every spacing with one type, every type with one of each spacing.
OTHERS = [("leading", 7), ("trailing", 20), ("linspace", 20)]
# Of a file of diffusers, where it makes an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def typed(first, others, types=TYPES):
    """Cases for the tests below: `first` with the first of the prediction types, `others` with each of the rest."""
    return [(types[0], *case) for case in first] + [(kind, *case) for kind in types[1:] for case in others]


def torch_denoiser(z, t):
    """Nonlinear in z and dependent on t, so that a wrong time or order shows."""
    return torch.tanh(z * (0.5 + t / 2000)) - t / 4000


def jax_denoiser(z, t):
    assert t.shape == (3,)
    t = t[:, None, None, None]
    return jnp.tanh(z * (0.5 + t / 2000)) - t / 4000


class Gap:
    """Stands for num_inference_steps, by which diffusers divides 1000 to know how far the next time lies."""

    def __init__(self, gap):
        self.gap = gap

    def __rfloordiv__(self, total):
        return self.gap


def theirs(scheduler, steps, gaps=None):
    scheduler.set_timesteps(steps)
    z = torch.tensor(NOISE) * scheduler.init_noise_sigma
    for place, t in enumerate(scheduler.timesteps):
        if gaps is not None:
            scheduler.num_inference_steps = Gap(gaps[place])
        z = scheduler.step(torch_denoiser(scheduler.scale_model_input(z, t), t), t, z).prev_sample
    assert torch.isfinite(z).all()
    return z.numpy()


def ours(sampler, prediction_type, steps, schedule=SCHEDULE):
    run = jax.jit(lambda noise: sampler(jax_denoiser, noise, schedule, prediction_type, steps, KEY))
    return np.asarray(run(NOISE))


def assert_same(made, expected):
    np.testing.assert_allclose(made, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


def visited(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.unique().flip(0).tolist()


def gaps_to_the_next(times):
    """From each time to the next one visited, and from the last beyond the end."""
    return [*(a - b for a, b in itertools.pairwise(times)), 1000]


@pytest.mark.parametrize(("prediction_type", "spacing", "steps"), typed(GRIDS, OTHERS))
def test_ddim(prediction_type, spacing, steps):
    """Told the true gap, diffusers agrees everywhere; by itself where 1000 // steps is that gap."""
    settings = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = DDIMScheduler(**BETAS, **settings, clip_sample=False, set_alpha_to_one=False)
    made = ours(DDIM(None, spacing, 1, False), prediction_type, steps)
    assert_same(made, theirs(scheduler, steps, gaps_to_the_next(visited(scheduler, steps))))
    if spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0):
        assert_same(made, theirs(scheduler, steps))


KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Every two of kind, type and clip together. Not squared cosines of epsilon without a clip: alpha is 5e-5 at the last
# step, and the estimate of z_0 has no digits in float32.
CLIPPED = [(t, k, (0.8, None)[(i + j) % 2]) for i, k in enumerate(KINDS) for j, t in enumerate(TYPES)]


@pytest.mark.parametrize(("prediction_type", "kind", "clip"), CLIPPED)
def test_ddim_with_every_schedule_and_clipped(prediction_type, kind, clip):
    scheduler = DDIMScheduler(
        **{**BETAS, "beta_schedule": kind},
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    assert_same(ours(DDIM(clip), prediction_type, 20, NoiseSchedule(kind)), theirs(scheduler, 20))


@pytest.mark.parametrize(("prediction_type", "spacing", "steps"), typed(GRIDS, OTHERS, TYPES[:2]))
def test_pndm(prediction_type, spacing, steps):
    settings = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = PNDMScheduler(**BETAS, **settings, skip_prk_steps=True)
    made = ours(PNDM(spacing, 1), prediction_type, steps)
    gaps = gaps_to_the_next(visited(scheduler, steps))
    # The second call repeats the first step.
    assert_same(made, theirs(scheduler, steps, gaps[:1] + gaps))
    if spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0):
        assert_same(made, theirs(scheduler, steps))


def test_pndm_down_to_clean_latents():
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=True)
    assert_same(ours(PNDM(set_alpha_to_one=True), "epsilon", 20), theirs(scheduler, 20))


KARRAS = ("leading", 20, True)
OTHERS_WITH_KARRAS = [*((*grid, False) for grid in OTHERS), KARRAS]
WITH_KARRAS = [*((*grid, False) for grid in GRIDS), ("linspace", 7, True), KARRAS, ("trailing", 1, True)]


@pytest.mark.parametrize(
    ("prediction_type", "spacing", "steps", "karras"),
    typed(WITH_KARRAS, OTHERS_WITH_KARRAS),
)
def test_euler(prediction_type, spacing, steps, karras):
    settings = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = EulerDiscreteScheduler(**BETAS, **settings, use_karras_sigmas=karras)
    assert_same(ours(Euler(spacing, 1, karras), prediction_type, steps), theirs(scheduler, steps))


@pytest.mark.parametrize(
    ("prediction_type", "spacing", "steps", "karras"),
    typed(WITH_KARRAS, OTHERS_WITH_KARRAS),
)
def test_dpm_solver(prediction_type, spacing, steps, karras):
    settings = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **settings, use_karras_sigmas=karras)
    assert_same(ours(DPMSolver(spacing, 1, karras), prediction_type, steps), theirs(scheduler, steps))


@pytest.fixture
def shared_noise(monkeypatch):
    """Called with the number of steps: diffusers is handed the noise of our key, zero at the last step (see `DDPM`)."""

    def share(steps):
        drawn = jax.vmap(lambda key: jax.random.normal(key, NOISE.shape))(jax.random.split(KEY, steps))
        fresh = iter([*np.array(drawn)[:-1], np.zeros_like(NOISE)])
        name = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        monkeypatch.setattr(name, lambda *args, **kwargs: torch.tensor(next(fresh)))

    return share


@pytest.mark.parametrize(
    ("prediction_type", "spacing", "steps", "variance_type", "clip"),
    typed(
        [
            ("leading", 7, "fixed_small", 0.9),
            ("trailing", 12, "fixed_large", None),
            ("linspace", 5, "fixed_small", 0.9),
        ],
        [("leading", 7, "fixed_large", None), ("trailing", 12, "fixed_small", 0.9)],
    ),
)
def test_ddpm_with_the_same_noise(prediction_type, spacing, steps, variance_type, clip, shared_noise):
    shared_noise(steps)
    settings = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    clipping = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    scheduler = DDPMScheduler(**BETAS, **settings, **clipping, variance_type=variance_type)
    assert_same(ours(DDPM(clip, spacing, 1, variance_type), prediction_type, steps), theirs(scheduler, steps))


ZERO = NoiseSchedule(rescale_betas_zero_snr=True)
PAIRS = {
    "ddim": (DDIM(), DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPM(0.9, "trailing"), DDPMScheduler, {"clip_sample_range": 0.9}),
    "euler": (Euler("trailing"), EulerDiscreteScheduler, {}),
    "dpm_solver": (DPMSolver("trailing"), DPMSolverMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_from_a_zero_signal_to_noise_ratio(prediction_type, name, shared_noise):
    sampler, cls, settings = PAIRS[name]
    shared_noise(20)
    settings = {**settings, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    scheduler = cls(**BETAS, **settings, rescale_betas_zero_snr=True)
    assert_same(ours(sampler, prediction_type, 20, ZERO), theirs(scheduler, 20))


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift, steps):
    def run(spacing):
        sampler = FlowEuler(FlowSchedule(shift), spacing)
        return jax.jit(lambda z: sampler(lambda z, t: jax_denoiser(z, 1000 * t), z, steps, KEY))(NOISE)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_same(run("linspace"), theirs_flow(scheduler, num_inference_steps=steps))
    assert_same(run("trailing"), theirs_flow(scheduler, sigmas=np.arange(steps, 0, -1) / steps))


def theirs_flow(scheduler, **times):
    scheduler.set_timesteps(**times)
    z = torch.tensor(NOISE)
    for t in scheduler.timesteps:
        z = scheduler.step(torch_denoiser(z, t), t, z).prev_sample
    return z.numpy()
