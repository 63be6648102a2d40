"""diffusers' scheduler_config.json in and out: the noise schedule, the prediction type and the sampler it names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from sysdpo_jax.diffusion.levels import Spacing
from sysdpo_jax.diffusion.samplers import DDIM, DDPM, PNDM, DPMSolver, Euler, FlowEuler, Sampler
from sysdpo_jax.diffusion.schedules import FlowSchedule, NoiseSchedule, PredictionType
from sysdpo_jax.pretrained.base import CLASSES, CheckpointError, ConfigReader, read_fields


@dataclass(frozen=True)
class DiffusionScheduler:
    """What the scheduler file of a diffusion model says; that of a rectified flow is read as a `FlowEuler`."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    sampler: Sampler


class _Family(NamedTuple):
    """A class of diffusers: the sampler that it is here, and the keys that only some classes have; others: keys.yaml.

    spacing: of the times, where the file does not say. reads: fields of the sampler whose keys have their names, with
    diffusers' defaults. clips: whether it bounds the estimates of z_0. rescales: whether it can move the last noise
    level to pure noise.
    """

    sampler: type[Any]
    spacing: Spacing
    reads: Mapping[str, Any]
    prediction_types: tuple[str, ...] = get_args(PredictionType)
    clips: bool = False
    rescales: bool = True


_FAMILIES = {
    "DDIMScheduler": _Family(DDIM, "leading", {"set_alpha_to_one": True}, clips=True),
    "DDPMScheduler": _Family(DDPM, "leading", {"variance_type": "fixed_small"}, clips=True),
    "EulerDiscreteScheduler": _Family(Euler, "linspace", {"use_karras_sigmas": False}),
    "DPMSolverMultistepScheduler": _Family(DPMSolver, "linspace", {"use_karras_sigmas": False}),
    "PNDMScheduler": _Family(PNDM, "leading", {"set_alpha_to_one": False}, ("epsilon", "v_prediction"), rescales=False),
}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_SHARED = {*_BETAS, "prediction_type", "timestep_spacing", "steps_offset"}
_FLOW = "FlowMatchEulerDiscreteScheduler"


def read(config: ConfigReader) -> DiffusionScheduler | FlowEuler:
    """The scheduler of a scheduler_config.json, computed as diffusers' class `_class_name` does.

    Raises `CheckpointError` for another class and, by name, for a setting that is not supported here.
    """
    name = config.take("_class_name")
    if name == _FLOW:
        made: DiffusionScheduler | FlowEuler = _read_flow(config)
    elif isinstance(name, str) and name in _FAMILIES:
        made = _read_diffusion(config, name)
    else:
        raise config.refused(
            "_class_name",
            f"choose {_FLOW} for a rectified flow, or one of {', '.join(_FAMILIES)}, and keep the file's betas and "
            "prediction_type",
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


def _write_diffusion(scheduler: DiffusionScheduler) -> tuple[dict[str, Any], set[str]]:
    """The content, and the keys of the class; those that the content leaves out have diffusers' default."""
    schedule = scheduler.schedule
    sampler: Any = scheduler.sampler
    name = next((name for name, family in _FAMILIES.items() if type(sampler) is family.sampler), None)
    if name is None:
        raise CheckpointError(
            f"diffusers has no scheduler for the sampler {type(sampler).__name__}: write the model with DDIM, which it "
            "can be sampled with too"
        )
    family = _FAMILIES[name]
    if scheduler.prediction_type not in family.prediction_types:
        raise CheckpointError(f"{name} takes no {scheduler.prediction_type} model: write it with another sampler")
    if schedule.rescale_betas_zero_snr and not family.rescales:
        raise CheckpointError(f"{name} does not know rescale_betas_zero_snr: write the model with another sampler")
    made = {
        "_class_name": name,
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": schedule.kind,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": scheduler.prediction_type,
        "timestep_spacing": sampler.spacing,
        **{key: getattr(sampler, key) for key in ("steps_offset", *family.reads)},
        **CLASSES[name].writes,
    }
    if family.rescales:
        made["rescale_betas_zero_snr"] = schedule.rescale_betas_zero_snr
    if family.clips:
        made["clip_sample"] = sampler.clip is not None
        made |= {} if sampler.clip is None else {"clip_sample_range": sampler.clip}
    return made, _keys(name) | _SHARED


def _keys(name: str) -> set[str]:
    """The keys of a class that not all classes have."""
    family, keys = _FAMILIES[name], CLASSES[name]
    clip = ("clip_sample", "clip_sample_range") if family.clips else ()
    rescale = ("rescale_betas_zero_snr",) if family.rescales else ()
    return {*family.reads, *keys.expects, *keys.ignores, *clip, *rescale}


def _read_diffusion(config: ConfigReader, name: str) -> DiffusionScheduler:
    family = _FAMILIES[name]
    if family.sampler is PNDM and not config.take("skip_prk_steps", False):
        raise CheckpointError(
            f"{config.where}: PNDM's Runge-Kutta start is not supported: set skip_prk_steps to true, as Stable "
            "Diffusion does, or choose DDIMScheduler"
        )
    # Files go from class to class with the keys of all of them, and each class reads only its own.
    config.ignore(*(set().union(*map(_keys, _FAMILIES)) - _keys(name)))
    config.expect_class(name)
    config.expect("trained_betas", None)
    config.expect("prediction_type", *family.prediction_types)
    schedule = NoiseSchedule(
        kind=config.read("beta_schedule", Literal["linear", "scaled_linear", "squaredcos_cap_v2"], "linear"),
        num_timesteps=config.read("num_train_timesteps", int, 1000),
        beta_start=config.read("beta_start", float, 0.0001),
        beta_end=config.read("beta_end", float, 0.02),
        rescale_betas_zero_snr=family.rescales and config.read("rescale_betas_zero_snr", bool, False),
    )
    values = read_fields(config, family.sampler, steps_offset=0, **family.reads)
    values["spacing"] = config.read("timestep_spacing", Spacing, family.spacing)
    if family.clips:
        bound = config.read("clip_sample_range", float, 1.0)
        values["clip"] = bound if config.read("clip_sample", bool, True) else None
    return DiffusionScheduler(schedule, config.take("prediction_type", "epsilon"), family.sampler(**values))


def _read_flow(config: ConfigReader) -> FlowEuler:
    config.expect_class(_FLOW)
    # The file does not speak of spacing: this is what diffusers' pipelines get that give no times of their own.
    return FlowEuler(FlowSchedule(**read_fields(config, FlowSchedule, "shift", "num_train_timesteps")), "linspace")


def _write_flow(sampler: FlowEuler) -> tuple[dict[str, Any], set[str]]:
    if sampler.spacing != "linspace":
        raise CheckpointError(
            f"{_FLOW} has no {sampler.spacing} spacing: write the model with FlowEuler(schedule, 'linspace'), the "
            "times that diffusers' pipelines take by default"
        )
    made = {"_class_name": _FLOW, **asdict(sampler.schedule)}
    return made, set(made)
