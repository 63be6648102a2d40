"""Schedules, prediction types, weightings and samplers against diffusers and formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from sysdpo_jax.generation.samplers import ddim, flow_euler, guided
from sysdpo_jax.generation.schedules import NoiseSchedule, add_noise, clean_and_noise, target
from sysdpo_jax.generation.weightings import ELBO, Constant, MinSNR

KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
TYPES = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_equals_diffusers(kind):
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=kind, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(NoiseSchedule(kind).alphas_cumprod(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_targets_equal_diffusers_and_can_be_inverted(prediction_type):
    rng = np.random.default_rng(0)
    clean, noise = jnp.asarray(rng.normal(size=(2, 5, 4, 4, 3)), jnp.float32)
    t = np.array([0, 1, 400, 900, 998])
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alpha, sigma = NoiseSchedule().alpha_sigma(jnp.asarray(t))
    noisy = add_noise(clean, noise, alpha, sigma)
    args = torch.tensor(np.asarray(clean)), torch.tensor(np.asarray(noise)), torch.tensor(t)
    np.testing.assert_allclose(noisy, theirs.add_noise(*args), atol=2e-5)
    answer = target(clean, noise, alpha, sigma, prediction_type)
    if prediction_type == "v_prediction":
        np.testing.assert_allclose(answer, theirs.get_velocity(*args), atol=2e-5)
    back_clean, back_noise = clean_and_noise(answer, noisy, alpha, sigma, prediction_type)
    # Dividing by alpha (0.07 at t = 998) or sigma (0.03 at t = 0) multiplies the float32 rounding.
    np.testing.assert_allclose(back_clean, clean, atol=1e-4)
    np.testing.assert_allclose(back_noise, noise, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_equals_diffusers_over_a_whole_trajectory(prediction_type):
    """The denoiser is an arbitrary smooth function of (z, t), the same in both; 20 steps; 1e-4 in float32."""
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, timestep_spacing="trailing",
        clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True,
    )  # fmt: skip
    theirs.set_timesteps(20)
    noise = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    z = torch.tensor(noise)
    for t in theirs.timesteps:
        z = theirs.step(torch.tanh(0.7 * z + t / 1000), t, z).prev_sample
    schedule = NoiseSchedule("squaredcos_cap_v2")

    def denoise(z, t):
        return jnp.tanh(0.7 * z + t[:, None, None, None] / 1000)

    ours = ddim(denoise, jnp.asarray(noise), schedule, prediction_type, 20, 1.0)
    np.testing.assert_allclose(ours, z, atol=1e-4)


def test_guidance_is_the_extrapolation_written_out():
    cond, uncond = jnp.array([[2.0], [3.0]]), jnp.array([[0.5], [0.5]])
    predict = guided(lambda z, t, c: z * c + t[:, None], cond, uncond, 4.0)
    z, t = jnp.array([[1.0], [2.0]]), jnp.array([10.0, 20.0])
    expected = [[0.5 + 10 + 4 * (2.0 - 0.5)], [1.0 + 20 + 4 * (6.0 - 1.0)]]
    np.testing.assert_allclose(predict(z, t), expected, rtol=1e-6)
    alone = guided(lambda z, t, c: z * c, cond, uncond, 1.0)
    np.testing.assert_allclose(alone(z, t), z * cond)


def test_flow_euler_follows_a_straight_line_exactly():
    """With the true velocity of a straight path, eps - z_0, Euler has no discretisation error."""
    noise = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    clean = jnp.full_like(noise, 0.25)
    np.testing.assert_allclose(flow_euler(lambda z, t: noise - clean, noise, 7), clean, atol=1e-6)


def snr_table():
    squared = NoiseSchedule().alphas_cumprod()
    return squared / (1 - squared)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_weightings_equal_their_formulas(prediction_type):
    """Each is a weight on the z_0 error; the errors of one model relate by e_eps = SNR e_0 and e_v = (SNR + 1) e_0."""
    schedule, t = NoiseSchedule(), np.array([1, 50, 500, 999])
    snr = snr_table()
    relation = {"epsilon": snr[t], "v_prediction": snr[t] + 1, "sample": np.ones(4)}[prediction_type]
    elbo = ELBO()(schedule, jnp.asarray(t), prediction_type, 48)
    np.testing.assert_allclose(elbo * relation, 1000 * 48 * (snr[t - 1] - snr[t]), rtol=2e-3)
    min_snr = MinSNR(10.0, 5.0)(schedule, jnp.asarray(t), prediction_type, 48)
    np.testing.assert_allclose(min_snr * relation, 10.0 * np.minimum(snr[t], 5.0), rtol=1e-4)
    assert (Constant(7.0)(schedule, jnp.asarray(t), prediction_type, 48) == 7.0).all()


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown noise schedule 'sigmoid'"):
        NoiseSchedule("sigmoid").betas()
