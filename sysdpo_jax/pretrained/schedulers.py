"""diffusers' scheduler_config.json in and out: the noise schedule, the prediction type and the sampler it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler, Sampler
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule, PredictionType
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader


@dataclass(frozen=True)
class DiffusionScheduler:
    """What the scheduler file of a diffusion model says; that of a rectified flow is read as a `FlowEuler`."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    sampler: Sampler


class _Family(NamedTuple):
    """One class of diffusers: its sampler here, the parameters that only some classes have, and how to read those."""

    sampler: type
    spacing: str  # the default, where the file does not say
    prediction_types: tuple[str, ...]
    keys: frozenset[str]
    read: Callable[[ConfigReader], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def read(config: ConfigReader) -> DiffusionScheduler | FlowEuler:
    """The scheduler of a scheduler_config.json, computed as diffusers' class `_class_name` does.

    Raises `CheckpointError` for another class and, by name, for a setting that is not supported here.
    """
    name = config.take("_class_name")
    config.expect_kind(str, "_class_name")
    config.expect_kind(int, "num_train_timesteps", "steps_offset")
    config.expect_kind((int, float), "beta_start", "beta_end", "shift", "clip_sample_range")
    config.expect_kind(bool, "set_alpha_to_one", "clip_sample", "rescale_betas_zero_snr", "skip_prk_steps")
    if name == "FlowMatchEulerDiscreteScheduler":
        made: DiffusionScheduler | FlowEuler = _read_flow(config)
    elif name in _FAMILIES:
        made = _read_diffusion(config, _FAMILIES[name])
    else:
        raise CheckpointError(
            f"{config.where}: _class_name={name!r} is not supported: choose FlowMatchEulerDiscreteScheduler for a "
            f"rectified flow, or one of {', '.join(_FAMILIES)}, and keep the file's betas and prediction_type"
        )
    config.finish()
    return made


def write(scheduler: DiffusionScheduler | FlowEuler, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a scheduler_config.json from which diffusers and `read` make the same scheduler.

    Args:
        scheduler: what the component samples with.
        source: the file that the component was read from. Where it still says this scheduler it is the result. Of a
            file that does not, because the sampler was changed, the keys of other classes are kept: diffusers' users
            change the class, and each class finds its own keys.

    Raises:
        CheckpointError: no class of diffusers computes it.
    """
    source = source or {}
    if source and read(ConfigReader(source, "the scheduler's file")) == scheduler:
        return dict(source)
    made, known = _write_flow(scheduler) if isinstance(scheduler, FlowEuler) else _write_diffusion(scheduler)
    return {**{name: value for name, value in source.items() if name not in known}, **made}


def _write_diffusion(scheduler: DiffusionScheduler) -> tuple[dict[str, Any], frozenset[str]]:
    """The content, and the keys of the class; those that the content leaves out have diffusers' default."""
    schedule, sampler = scheduler.schedule, scheduler.sampler
    name = next((name for name, family in _FAMILIES.items() if type(sampler) is family.sampler), None)
    if name is None:
        raise CheckpointError(
            f"diffusers has no scheduler for the sampler {type(sampler).__name__}: write the model with DDIM, which it "
            "can be sampled with too"
        )
    family = _FAMILIES[name]
    if scheduler.prediction_type not in family.prediction_types:
        raise CheckpointError(f"{name} takes no {scheduler.prediction_type} model: write it with another sampler")
    if schedule.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in family.keys:
        raise CheckpointError(f"{name} does not know rescale_betas_zero_snr: write the model with another sampler")
    made = {
        "_class_name": name,
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": schedule.kind,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": scheduler.prediction_type,
        **family.write(sampler),
    }
    if "rescale_betas_zero_snr" in family.keys:
        made["rescale_betas_zero_snr"] = schedule.rescale_betas_zero_snr
    return made, family.keys | _SHARED


def _read_diffusion(config: ConfigReader, family: _Family) -> DiffusionScheduler:
    # Files go from class to class with the keys of all of them, and each class reads only its own.
    config.ignore(*(_EVERYWHERE - _SHARED - family.keys))
    config.expect("trained_betas", None)
    config.expect("beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2")
    config.expect("prediction_type", *family.prediction_types)
    config.expect("timestep_spacing", "leading", "trailing", "linspace")
    rescaled = "rescale_betas_zero_snr" in family.keys and config.take("rescale_betas_zero_snr", False)
    schedule = NoiseSchedule(
        kind=config.take("beta_schedule", "linear"),
        num_timesteps=config.take("num_train_timesteps", 1000),
        beta_start=config.take("beta_start", 0.0001),
        beta_end=config.take("beta_end", 0.02),
        rescale_betas_zero_snr=rescaled,
    )
    sampler = family.sampler(
        spacing=config.take("timestep_spacing", family.spacing),
        steps_offset=config.take("steps_offset", 0),
        **family.read(config),
    )
    return DiffusionScheduler(schedule, config.take("prediction_type", "epsilon"), sampler)


def _read_clip(config: ConfigReader) -> dict[str, Any]:
    config.expect("thresholding", False)
    # Of dynamic thresholding only.
    config.ignore("dynamic_thresholding_ratio", "sample_max_value")
    bound = config.take("clip_sample_range", 1.0)
    return {"clip": float(bound) if config.take("clip_sample", True) else None}


def _write_spacing(sampler: DDIM | DDPM | Euler | DPMSolver | PNDM) -> dict[str, Any]:
    return {"timestep_spacing": sampler.spacing, "steps_offset": sampler.steps_offset}


def _write_ddim(sampler: DDIM) -> dict[str, Any]:
    return {"set_alpha_to_one": sampler.set_alpha_to_one, **_write_clip(sampler)}


def _write_ddpm(sampler: DDPM) -> dict[str, Any]:
    return {"variance_type": sampler.variance_type, **_write_clip(sampler)}


def _write_clip(sampler: DDIM | DDPM) -> dict[str, Any]:
    clip = {"clip_sample": False} if sampler.clip is None else {"clip_sample": True, "clip_sample_range": sampler.clip}
    return {**clip, **_write_spacing(sampler)}


def _write_ratios(sampler: Euler | DPMSolver) -> dict[str, Any]:
    return {"use_karras_sigmas": sampler.use_karras_sigmas, **_write_spacing(sampler)}


def _write_pndm(sampler: PNDM) -> dict[str, Any]:
    return {"skip_prk_steps": True, "set_alpha_to_one": sampler.set_alpha_to_one, **_write_spacing(sampler)}


def _read_ddim(config: ConfigReader) -> dict[str, Any]:
    return {"set_alpha_to_one": config.take("set_alpha_to_one", True), **_read_clip(config)}


def _read_ddpm(config: ConfigReader) -> dict[str, Any]:
    config.expect("variance_type", "fixed_small", "fixed_large")
    return {"variance_type": config.take("variance_type", "fixed_small"), **_read_clip(config)}


def _read_euler(config: ConfigReader) -> dict[str, Any]:
    config.expect("interpolation_type", "linear")
    config.expect("timestep_type", "discrete")
    for bound in ("sigma_min", "sigma_max"):
        config.expect(bound, None)
    return _read_ratios(config)


def _read_dpm_solver(config: ConfigReader) -> dict[str, Any]:
    config.expect("algorithm_type", "dpmsolver++")
    config.expect("solver_order", 2)
    config.expect("solver_type", "midpoint")
    config.expect("thresholding", False)
    config.expect("variance_type", None)
    config.expect("lambda_min_clipped", float("-inf"))
    for kind in ("use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"):
        config.expect(kind, False)
    # Of dynamic thresholding and of flows only.
    config.ignore("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")
    # With a final sigma of 0 and order 2 the last step is first-order, whatever these say.
    config.ignore("lower_order_final", "euler_at_final")
    return _read_ratios(config)


def _read_ratios(config: ConfigReader) -> dict[str, Any]:
    config.expect("use_exponential_sigmas", False, None)
    config.expect("use_beta_sigmas", False, None)
    config.expect("final_sigmas_type", "zero")
    return {"use_karras_sigmas": bool(config.take("use_karras_sigmas", False))}


def _read_pndm(config: ConfigReader) -> dict[str, Any]:
    if not config.take("skip_prk_steps", False):
        raise CheckpointError(
            f"{config.where}: PNDM's Runge-Kutta start is not supported: set skip_prk_steps to true, as Stable "
            "Diffusion does, or choose DDIMScheduler"
        )
    return {"set_alpha_to_one": config.take("set_alpha_to_one", False)}


_BETAS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas"
_SHARED = frozenset(f"{_BETAS} prediction_type timestep_spacing steps_offset".split())
_CLIP = "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value rescale_betas_zero_snr"
_RATIOS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas final_sigmas_type rescale_betas_zero_snr"
_ANY = ("epsilon", "v_prediction", "sample")

_FAMILIES = {
    "DDIMScheduler": _Family(
        sampler=DDIM,
        spacing="leading",
        prediction_types=_ANY,
        keys=frozenset(f"set_alpha_to_one {_CLIP}".split()),
        read=_read_ddim,
        write=_write_ddim,
    ),
    "DDPMScheduler": _Family(
        sampler=DDPM,
        spacing="leading",
        prediction_types=_ANY,
        keys=frozenset(f"variance_type {_CLIP}".split()),
        read=_read_ddpm,
        write=_write_ddpm,
    ),
    "EulerDiscreteScheduler": _Family(
        sampler=Euler,
        spacing="linspace",
        prediction_types=_ANY,
        keys=frozenset(f"interpolation_type timestep_type sigma_min sigma_max {_RATIOS}".split()),
        read=_read_euler,
        write=_write_ratios,
    ),
    "DPMSolverMultistepScheduler": _Family(
        sampler=DPMSolver,
        spacing="linspace",
        prediction_types=_ANY,
        keys=frozenset(
            "solver_order thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type "
            "lower_order_final euler_at_final use_lu_lambdas use_flow_sigmas flow_shift lambda_min_clipped "
            f"variance_type use_dynamic_shifting time_shift_type {_RATIOS}".split()
        ),
        read=_read_dpm_solver,
        write=_write_ratios,
    ),
    "PNDMScheduler": _Family(
        sampler=PNDM,
        spacing="leading",
        prediction_types=("epsilon", "v_prediction"),
        keys=frozenset({"skip_prk_steps", "set_alpha_to_one"}),
        read=_read_pndm,
        write=_write_pndm,
    ),
}
_EVERYWHERE = _SHARED.union(*(family.keys for family in _FAMILIES.values()))


def _read_flow(config: ConfigReader) -> FlowEuler:
    for kind in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        config.expect(kind, False)
    config.expect("shift_terminal", None)
    for kind in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        config.expect(kind, False, None)
    # Of dynamic shifting only.
    config.ignore("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
    schedule = FlowSchedule(config.take("shift", 1.0), config.take("num_train_timesteps", 1000))
    # The file does not speak of spacing: this is what diffusers' pipelines get that give no times of their own.
    return FlowEuler(schedule, "linspace")


def _write_flow(sampler: FlowEuler) -> tuple[dict[str, Any], frozenset[str]]:
    if sampler.spacing != "linspace":
        raise CheckpointError(
            f"FlowMatchEulerDiscreteScheduler has no {sampler.spacing} spacing: write the model with "
            "FlowEuler(schedule, 'linspace'), the times that diffusers' pipelines take by default"
        )
    schedule = sampler.schedule
    made = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "shift": schedule.shift,
    }
    return made, frozenset(made)
