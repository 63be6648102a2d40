"""Samplers on a problem with a known answer, their errors, and guidance; parity/test_trajectories.py has diffusers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax.diffusion.levels import spaced_times
from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler, Sampler, guided
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule

SCHEDULE = NoiseSchedule()
ZERO = NoiseSchedule(rescale_betas_zero_snr=True)
KEY = jax.random.key(3)
NOISE = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
SAMPLERS = [DDIM(), DDPM(), Euler(), Euler(use_karras_sigmas=True), DPMSolver(), PNDM()]
MEAN, DEVIATION = 0.7, 0.4


def gaussian_denoiser(schedule):
    """The best prediction of eps when the data are N(MEAN, DEVIATION^2): what a perfect model would answer."""
    table = jnp.asarray(schedule.alphas_cumprod(), jnp.float32)

    def denoise(z, t):
        squared = jnp.interp(t, jnp.arange(len(table)), table)[:, None]
        alpha, sigma = jnp.sqrt(squared), jnp.sqrt(1 - squared)
        return sigma * (z - alpha * MEAN) / (squared * DEVIATION**2 + sigma**2)

    return denoise


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_draws_the_data(sampler):
    """To 0.03: the start has mean 0, not the diffused data's 0.05, and DEVIATION times that reaches the end (0.02)."""
    noise = jax.random.normal(KEY, (20_000, 1))
    run = jax.jit(lambda noise, key: sampler(gaussian_denoiser(SCHEDULE), noise, SCHEDULE, "epsilon", 100, key))
    made = run(noise, jax.random.key(4))
    assert abs(made.mean() - MEAN) < 0.03
    assert abs(made.std() - DEVIATION) < 0.03
    again = run(noise, jax.random.key(5))
    assert (sampler == DDPM()) == bool((made != again).any())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samplers_are_static_arguments(sampler):
    """Equal samplers share one compilation, and it holds the whole loop."""
    assert isinstance(sampler, Sampler)
    calls = []

    def denoise(z, t):
        calls.append(t.shape)
        return jnp.tanh(z)

    @partial(jax.jit, static_argnums=0)
    def run(sampler, noise, key):
        return sampler(denoise, noise, SCHEDULE, "epsilon", 12, key)

    run(sampler, NOISE, KEY)
    run(type(sampler)(**vars(sampler)), NOISE, KEY)
    assert calls == [(3,)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spaced_times_fall_within_the_schedule_for_every_number_of_steps(spacing):
    for steps in range(1, 1001):
        times = spaced_times(spacing, 1000, steps, 0)
        assert len(times) == steps
        assert times.min() >= 0
        assert times.max() <= 999
        assert (np.diff(times) < 0).all()


def test_leading_times_are_raised_by_the_offset():
    np.testing.assert_array_equal(spaced_times("leading", 1000, 4, 1), [751, 501, 251, 1])


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        (DDIM(), 0, "num_steps=0 must lie within 1 and the schedule's 1000 timesteps"),
        (DDPM(), 1001, "num_steps=1001"),
        (Euler("leading", 1), 1000, "1000 steps with leading spacing and steps_offset=1 begin at t=1000"),
        (DPMSolver(), 1000, "num_steps=1001"),
    ],
)
def test_steps_that_do_not_fit_are_refused(sampler, steps, message):
    with pytest.raises(ValueError, match=message):
        sampler(lambda z, t: z, jnp.asarray(NOISE), SCHEDULE, "epsilon", steps, KEY)


@pytest.mark.parametrize("sampler", [DDIM(), DDPM(spacing="trailing"), PNDM("linspace")], ids=repr)
def test_epsilon_at_a_zero_signal_to_noise_ratio_is_refused(sampler):
    with pytest.raises(ValueError, match="an epsilon prediction says nothing of the clean latents at t=999"):
        sampler(lambda z, t: z, jnp.asarray(NOISE), ZERO, "epsilon", 4, KEY)


def test_epsilon_is_allowed_where_the_zero_is_not_visited():
    made = DDIM(spacing="leading")(lambda z, t: jnp.tanh(z), jnp.asarray(NOISE), ZERO, "epsilon", 4, KEY)
    assert np.isfinite(made).all()


def test_pndm_refuses_a_sample_model():
    with pytest.raises(ValueError, match="PNDM takes epsilon or v_prediction"):
        PNDM()(lambda z, t: z, jnp.asarray(NOISE), SCHEDULE, "sample", 4, KEY)


@pytest.mark.parametrize("sampler", [FlowEuler(), FlowEuler(FlowSchedule(3.0), "linspace")], ids=repr)
def test_flow_euler_is_exact_where_the_velocity_is_constant(sampler):
    """A straight line from noise to data: any number of steps lands on the data, to float32 rounding."""
    clean = jnp.full(NOISE.shape, 0.3)
    np.testing.assert_allclose(sampler(lambda z, t: NOISE - clean, jnp.array(NOISE), 5, KEY), clean, atol=1e-6)


def test_flow_euler_visits_the_shifted_times():
    seen = []

    def denoise(z, t):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return z

    jax.block_until_ready(FlowEuler(FlowSchedule(3.0))(denoise, jnp.array(NOISE), 4, KEY))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen, reverse=True), [1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5], atol=1e-6)


def test_flow_euler_needs_a_step():
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        FlowEuler()(lambda z, t: z, jnp.array(NOISE), 0, KEY)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 1.5, 7.5])
def test_guidance_is_the_formula_of_classifier_free_guidance_above_one(scale):
    """With two arrays of conditioning, of different shapes; one forward pass of twice the rows.

    At most 1 it is the conditional prediction alone, of as many rows as there are: diffusers' rule.
    """
    rng = np.random.default_rng(1)
    cond, null = (
        (rng.normal(size=(3, 1, 1, 2)).astype(np.float32), rng.normal(size=3).astype(np.float32)) for _ in range(2)
    )
    calls = []

    def denoise(z, t, text, size):
        calls.append(z.shape[0])
        return z * text + (t + size)[:, None, None, None]

    def written_out(text, size):
        return NOISE * text + (np.arange(3) + size)[:, None, None, None]

    arrays = [tuple(map(jnp.asarray, half)) for half in (cond, null)]
    made = guided(denoise, arrays[0], arrays[1] if scale > 1 else None, scale)(jnp.array(NOISE), jnp.arange(3.0))
    used = max(scale, 1.0)
    expected = written_out(*null) + used * (written_out(*cond) - written_out(*null))
    np.testing.assert_allclose(made, expected, atol=2e-5)
    assert calls == [6 if scale > 1 else 3]


def test_guidance_without_the_unconditional_half_is_refused():
    with pytest.raises(ValueError, match=r"scale 2\.0 needs the unconditional conditioning"):
        guided(lambda z, t, text: z, (jnp.ones((3, 2)),), None, 2.0)
