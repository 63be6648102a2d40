"""Schedules, prediction types and weightings against diffusers and formulas written out."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule, add_noise, clean_and_noise, target
from sysdpo_jax.diffusion.weightings import ELBO, Constant, MinSNR

KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
TYPES = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_equals_diffusers(kind, rescaled):
    """2e-5: diffusers multiplies 1000 factors in float32; rescaled, it also subtracts two of them (1e-6)."""
    theirs = DDPMScheduler(
        beta_schedule=kind, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescaled
    )  # fmt: skip
    ours = NoiseSchedule(kind, rescale_betas_zero_snr=rescaled)
    atol = 1e-6 if rescaled else 1e-8
    np.testing.assert_allclose(ours.alphas_cumprod(), theirs.alphas_cumprod, rtol=2e-5, atol=atol)


def test_a_zero_terminal_snr_leaves_the_first_level_and_the_coefficients_finite():
    """arXiv 2305.08891, algorithm 1: sqrt(alpha_bar) keeps its first value, its last becomes 0, spacing is affine."""
    before, after = NoiseSchedule(), NoiseSchedule(rescale_betas_zero_snr=True)
    old, new = np.sqrt(before.alphas_cumprod()), np.sqrt(after.alphas_cumprod())
    assert after.alphas_cumprod()[-1] == 0
    np.testing.assert_allclose(new, (old - old[-1]) * old[0] / (old[0] - old[-1]), atol=1e-12)
    alpha, sigma = after.alpha_sigma(jnp.array([0, 999]))
    np.testing.assert_allclose(alpha, [old[0], 0], rtol=1e-6)
    assert sigma[1] == 1
    assert (after.snr()[:-1] > 0).all()
    assert after.snr()[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_equals_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = FlowSchedule(shift).sigma(np.arange(1000, 0, -1) / 1000)
    np.testing.assert_allclose(ours, theirs.sigmas, atol=1e-6)
    np.testing.assert_allclose(FlowSchedule(shift).sigma(jnp.array([0.0, 1.0])), [0, 1], atol=1e-6)


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


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_weightings_equal_their_formulas(prediction_type, rescaled):
    """Each is a weight on the z_0 error; the errors of one model relate by e_eps = SNR e_0 and e_v = (SNR + 1) e_0."""
    schedule, t = NoiseSchedule(rescale_betas_zero_snr=rescaled), np.array([1, 50, 500, 998])
    squared = schedule.alphas_cumprod()
    snr = squared / (1 - squared)
    relation = {"epsilon": snr[t], "v_prediction": snr[t] + 1, "sample": np.ones(4)}[prediction_type]
    elbo = ELBO()(schedule, jnp.asarray(t), prediction_type, 48)
    np.testing.assert_allclose(elbo * relation, 1000 * 48 * (snr[t - 1] - snr[t]), rtol=1e-6)
    min_snr = MinSNR(10.0, 5.0)(schedule, jnp.asarray(t), prediction_type, 48)
    np.testing.assert_allclose(min_snr * relation, 10.0 * np.minimum(snr[t], 5.0), rtol=1e-6)
    assert (Constant(7.0)(schedule, jnp.asarray(t), prediction_type, 48) == 7.0).all()
    assert (ELBO()(schedule, jnp.zeros(1, jnp.int32), prediction_type, 48) == 0).all()


def test_weightings_where_the_snr_is_zero():
    """On the z_0 and v errors T (SNR(t-1) - 0) and min(0, gamma); on the eps error the limits, 1 and infinity."""
    schedule, last = NoiseSchedule(rescale_betas_zero_snr=True), jnp.array([999])
    before = schedule.alphas_cumprod()[998]
    for prediction_type in ("v_prediction", "sample"):
        np.testing.assert_allclose(
            ELBO()(schedule, last, prediction_type, 48), 1000 * 48 * before / (1 - before), rtol=1e-6
        )
        assert MinSNR()(schedule, last, prediction_type, 48) == 0
    assert MinSNR(10.0)(schedule, last, "epsilon", 48) == 10
    assert ELBO()(schedule, last, "epsilon", 48) == np.inf


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown noise schedule 'sigmoid'"):
        NoiseSchedule("sigmoid").betas()
