"""diffusers' scheduler files: the real ones, every key of every class, and the way back."""

import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.schedulers import DiffusionScheduler, read, write

# Of a file of diffusers, where it makes an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD = {**BETAS, "trained_betas": None, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **OLD, "steps_offset": 1}
SD21_BASE = {**SD15, "_diffusers_version": "0.8.0", "prediction_type": "epsilon"}
SD21 = {**SD21_BASE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
    **OLD,
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
STABLE = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012)
REAL = {
    "sd15": (SD15, DiffusionScheduler(STABLE, "epsilon", PNDM("leading", 1))),
    "sd21_base": (SD21_BASE, DiffusionScheduler(STABLE, "epsilon", PNDM("leading", 1))),
    "sd21": (SD21, DiffusionScheduler(STABLE, "v_prediction", DDIM(None, "leading", 1, False))),
    "sdxl": (SDXL, DiffusionScheduler(STABLE, "epsilon", Euler("leading", 1))),
    "sd3": (SD3, FlowEuler(FlowSchedule(3.0), "linspace")),
}
CLASSES = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "FlowMatchEulerDiscreteScheduler": {},
}
COSINE = NoiseSchedule("squaredcos_cap_v2", 500)
ZERO = NoiseSchedule("linear", 1000, 0.0001, 0.02, rescale_betas_zero_snr=True)
WRITTEN = [
    DiffusionScheduler(ZERO, "v_prediction", DDIM(None, "trailing")),
    DiffusionScheduler(COSINE, "sample", DDIM(0.7, "linspace", 0, False)),
    DiffusionScheduler(ZERO, "sample", DDPM(2.0, "trailing", 0, "fixed_large")),
    DiffusionScheduler(STABLE, "epsilon", DDPM(steps_offset=1)),
    DiffusionScheduler(ZERO, "v_prediction", Euler("trailing", 0, True)),
    DiffusionScheduler(STABLE, "epsilon", DPMSolver("leading", 1, False)),
    DiffusionScheduler(STABLE, "v_prediction", DPMSolver("linspace", 0, True)),
    DiffusionScheduler(COSINE, "v_prediction", PNDM("trailing", 0, True)),
    FlowEuler(FlowSchedule(1.5, 500), "linspace"),
    *(scheduler for _, scheduler in REAL.values()),
]


def reading(values):
    return read(ConfigReader(values, "scheduler_config.json"))


def parameters(name):
    return {key: p.default for key, p in inspect.signature(getattr(diffusers, name)).parameters.items()}


@pytest.mark.parametrize("name", REAL)
def test_the_files_of_stable_diffusion(name):
    values, expected = REAL[name]
    assert reading(values) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_with_nothing_but_defaults_reads_as_the_defaults_written_out(name):
    """So our defaults are diffusers' own, and every key of the class is known."""
    needed = {"_class_name": name, **CLASSES[name]}
    assert reading(needed) == reading({**parameters(name), **needed})


# A value other than the default for every key that is refused unless it has that default.
REFUSED = {
    "algorithm_type": "sde-dpmsolver++",
    "beta_schedule": "sigmoid",
    "final_sigmas_type": "sigma_min",
    "interpolation_type": "log_linear",
    "invert_sigmas": True,
    "lambda_min_clipped": -5.1,
    "sigma_max": 10.0,
    "sigma_min": 0.1,
    "shift_terminal": 0.1,
    "solver_order": 3,
    "solver_type": "heun",
    "stochastic_sampling": True,
    "thresholding": True,
    "timestep_spacing": "uniform",
    "timestep_type": "continuous",
    "trained_betas": [0.1, 0.2],
    "use_beta_sigmas": True,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": True,
    "use_flow_sigmas": True,
    "use_lu_lambdas": True,
    "variance_type": "learned_range",
    "prediction_type": "flow_prediction",
    "skip_prk_steps": False,
}
# A value that changes what is read.
CHANGING = {
    "beta_end": 0.5,
    "beta_start": 1e-5,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "clip_sample_range": 3.0,
    "num_train_timesteps": 77,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": None,
    "shift": 2.0,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
# Those that take effect only with one of the refused.
IDLE = {
    "base_image_seq_len": 128,
    "base_shift": 0.1,
    "dynamic_thresholding_ratio": 0.9,
    "euler_at_final": True,
    "flow_shift": 3.0,
    "lower_order_final": False,
    "max_image_seq_len": 128,
    "max_shift": 2.0,
    "sample_max_value": 2.0,
    "time_shift_type": "linear",
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_read_refused_or_idle(name):
    """No key of diffusers' class escapes: one of the three tables has it, and says truly what becomes of it."""
    needed = {"_class_name": name, **CLASSES[name]}
    plain = reading(needed)
    flow = name.startswith("Flow")
    for key, default in parameters(name).items():
        if key == "use_karras_sigmas":
            if flow:
                with pytest.raises(CheckpointError, match="use_karras_sigmas=True"):
                    reading({**needed, key: True})
            else:
                assert reading({**needed, key: True}) != plain
            continue
        assert key in REFUSED or key in CHANGING or key in IDLE, key
        if key in REFUSED:
            with pytest.raises(CheckpointError, match=key):
                reading({**needed, key: REFUSED[key]})
        if key in CHANGING:
            value = (not default) if CHANGING[key] is None else CHANGING[key]
            assert reading({**needed, key: value}) != plain, key
        if key in IDLE:
            assert reading({**needed, key: IDLE[key]}) == plain, key


def test_keys_of_other_classes_are_ignored_as_diffusers_does():
    assert reading({**SDXL, "thresholding": True, "solver_order": 3}) == reading(SDXL)


def test_unknown_keys_classes_and_a_runge_kutta_start_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json has keys .* warp=2"):
        reading({**SDXL, "warp": 2})
    with pytest.raises(CheckpointError, match="_class_name='HeunDiscreteScheduler' is not supported"):
        reading({**SDXL, "_class_name": "HeunDiscreteScheduler"})
    with pytest.raises(CheckpointError, match="set skip_prk_steps to true"):
        reading({**BETAS, "_class_name": "PNDMScheduler"})
    with pytest.raises(CheckpointError, match="prediction_type='sample' is not supported"):
        reading({**SD15, "prediction_type": "sample"})
    with pytest.raises(CheckpointError, match="thresholding=True"):
        reading({**SD21, "thresholding": True})


@pytest.mark.parametrize("scheduler", WRITTEN, ids=str)
def test_what_is_written_reads_back_the_same(scheduler):
    assert reading(write(scheduler)) == scheduler


def times_visited(scheduler, steps):
    """What the denoiser is told, in the order of the calls."""
    times = []

    def denoise(z, t):
        times.append(float(t[0]))
        return jnp.tanh(z)

    # Not jitted, a scan is a plain loop.
    with jax.disable_jit():
        noise, key = jnp.ones((1, 2)), jax.random.key(0)
        if isinstance(scheduler, FlowEuler):
            scheduler(denoise, noise, steps, key)
            return np.array(times) * scheduler.schedule.num_train_timesteps
        scheduler.sampler(denoise, noise, scheduler.schedule, scheduler.prediction_type, steps, key)
    return np.array(times)


@pytest.mark.parametrize("scheduler", WRITTEN, ids=str)
def test_diffusers_makes_the_same_scheduler_of_what_is_written(scheduler):
    """The same times for 10 steps, the same betas, and no key unknown to the class.

    1e-3 of a time up to 1000 is float32 rounding; 5e-6 of a beta that of the rescaled ones, ratios of differences.
    """
    values = write(scheduler)
    name = values["_class_name"]
    assert set(values) - {"_class_name"} <= set(parameters(name))
    theirs = getattr(diffusers, name).from_config(values)
    theirs.set_timesteps(10)
    np.testing.assert_allclose(times_visited(scheduler, 10), theirs.timesteps, rtol=0, atol=1e-3)
    if isinstance(scheduler, DiffusionScheduler):
        np.testing.assert_allclose(scheduler.schedule.betas(), theirs.betas, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", REAL)
def test_a_file_that_still_says_the_scheduler_is_handed_on_whole(name):
    values, scheduler = REAL[name]
    assert write(scheduler, values) == values


def test_of_a_changed_sampler_the_keys_of_other_classes_are_kept():
    """SDXL's file names clip_sample=false for DDIM and skip_prk_steps=true for PNDM, for whoever changes the class."""
    _, read = REAL["sdxl"]
    source = {**SDXL, "thresholding": True}
    changed = DiffusionScheduler(read.schedule, read.prediction_type, DPMSolver("trailing", 0))
    written = write(changed, source)
    assert reading(written) == changed
    assert {"clip_sample", "set_alpha_to_one", "skip_prk_steps", "_diffusers_version"} <= set(written)
    # Of DPM-Solver++ too, where it would mean something that is not computed here.
    assert "thresholding" not in written
    assert reading({**written, "_class_name": "PNDMScheduler"}).sampler == PNDM("trailing", 0)
    flow = FlowEuler(FlowSchedule(1.5, 500), "linspace")
    assert write(flow, {**SD3, "base_shift": 0.1}) == {
        **SD3,
        "base_shift": 0.1,
        "shift": 1.5,
        "num_train_timesteps": 500,
    }


class Unknown(DDIM):
    """A sampler that diffusers does not have."""


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DiffusionScheduler(STABLE, "epsilon", Unknown()), "no scheduler for the sampler Unknown"),
        (DiffusionScheduler(STABLE, "sample", PNDM()), "PNDMScheduler takes no sample model"),
        (DiffusionScheduler(ZERO, "v_prediction", PNDM()), "PNDMScheduler does not know rescale_betas_zero_snr"),
        (FlowEuler(), "FlowMatchEulerDiscreteScheduler has no trailing spacing"),
    ],
)
def test_what_diffusers_cannot_compute_is_not_written(scheduler, message):
    with pytest.raises(CheckpointError, match=message):
        write(scheduler)
