"""Whole trajectories against diffusers' schedulers, with the same denoiser written in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sysdpo_jax.generation.samplers import ddim, flow_euler, guided
from sysdpo_jax.generation.schedules import NoiseSchedule

NOISE = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
# float32 rounding over at most 20 steps of values below 10.
TOLERANCE = 1e-5


def torch_denoiser(z, t):
    """Nonlinear in z and dependent on t, so that a wrong time or order shows."""
    return torch.tanh(z * (0.5 + t / 2000)) - t / 4000


def jax_denoiser(z, t):
    assert t.shape == (3,)
    t = t[:, None, None, None]
    return jnp.tanh(z * (0.5 + t / 2000)) - t / 4000


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("steps", [1, 8, 20])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_follows_diffusers(prediction_type, kind, steps, clip):
    """Numbers of steps that divide 1000: for others diffusers lands between the times it visits."""
    if kind == "squaredcos_cap_v2" and prediction_type == "epsilon" and clip is None:
        pytest.skip("alpha is 5e-5 at the last step: the estimate of z_0 has no digits in float32")
    theirs = DDIMScheduler(
        beta_schedule=kind,
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    theirs.set_timesteps(steps)
    z = torch.tensor(NOISE)
    for t in theirs.timesteps:
        z = theirs.step(torch_denoiser(z, t), t, z).prev_sample
    ours = jax.jit(lambda noise: ddim(jax_denoiser, noise, NoiseSchedule(kind), prediction_type, steps, clip))(NOISE)
    np.testing.assert_allclose(ours, z.numpy(), atol=TOLERANCE * max(1.0, float(z.abs().max())))


@pytest.mark.parametrize("steps", [1, 7, 13])
def test_flow_euler_follows_diffusers(steps):
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(sigmas=np.arange(steps, 0, -1) / steps)
    z = torch.tensor(NOISE)
    for t in theirs.timesteps:
        z = theirs.step(torch_denoiser(z, t), t, z).prev_sample
    ours = flow_euler(lambda z, t: jax_denoiser(z, 1000 * t), jnp.array(NOISE), steps)
    np.testing.assert_allclose(ours, z.numpy(), atol=TOLERANCE * max(1.0, float(z.abs().max())))


def test_flow_euler_is_exact_where_the_velocity_is_constant():
    """A straight line from noise to data: any number of steps lands on the data, to float32 rounding."""
    clean = jnp.full(NOISE.shape, 0.3)
    np.testing.assert_allclose(flow_euler(lambda z, t: NOISE - clean, jnp.array(NOISE), 5), clean, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_is_the_formula_of_classifier_free_guidance(scale):
    cond, null = np.random.default_rng(1).normal(size=(2, 3, 1, 1, 2)).astype(np.float32)
    calls = []

    def denoise(z, t, text):
        calls.append(z.shape[0])
        return z * text + t[:, None, None, None]

    made = guided(denoise, jnp.array(cond), jnp.array(null), scale)(jnp.array(NOISE), jnp.arange(3.0))
    t = np.arange(3.0)[:, None, None, None]
    expected = (NOISE * null + t) + scale * ((NOISE * cond + t) - (NOISE * null + t))
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert calls == [3 if scale == 1.0 else 6]
