"""Settings of the wrong kind in the files of models: a list, a null or a text is understood or refused by its name."""

import pytest

from sysdpo_jax.pretrained import CheckpointError, schedulers
from sysdpo_jax.pretrained.base import CLASSES, ConfigReader
from sysdpo_jax.pretrained.decoders import FAMILIES, find_family
from sysdpo_jax.pretrained.image_models import CLIP, MMDIT, PARTS, T5, UNET, VAE
from sysdpo_jax.pretrained.kinds import KINDS
from tests.pretrained import hub_configs as hub
from tests.pretrained.test_sd3_configs import SD35_MEDIUM, T5_XXL

PNDM = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM |= {"num_train_timesteps": 1000, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DECODERS = (hub.LLAMA_32_1B_INSTRUCT, hub.QWEN3_06B, hub.GEMMA2_9B_IT, hub.GEMMA3_1B_IT)
FILES = [(UNET.read, hub.SDXL_UNET), (VAE.read, hub.SDXL_VAE), (CLIP.read, hub.SDXL_CLIP_2)]
FILES += [(MMDIT.read, SD35_MEDIUM), (T5.read, T5_XXL), (schedulers.read, PNDM), (schedulers.read, FLOW)]
FILES += [(find_family(values["model_type"], "config.json").read, values) for values in DECODERS]


@pytest.mark.parametrize(("read", "values"), FILES)
def test_every_setting_of_another_kind_is_understood_or_refused_by_name(read, values):
    """What comes out is hashable, so that nothing is refused later in the words of another library."""
    changes = [{name: other} for name, value in values.items() for other in others(value)]
    messages = [message for change in changes if (message := refusal(read, values | change)) is not None]
    assert len(messages) > len(values)
    for message in messages:
        assert message.startswith("config.json")
        assert "rotary scaling" in message or any(name in message for name in values), message


def others(value):
    return [value], [value, value], [[value]], {}, "text", None, True


def refusal(read, values):
    try:
        hash(read(ConfigReader(values, "config.json")))
    except CheckpointError as error:
        return str(error)
    return None


def test_lists_that_mean_something_are_read():
    sizes = [
        read(ConfigReader(values | {"sample_size": [96, 128]}, "config.json")).sample_size
        for read, values in ((UNET.read, hub.SDXL_UNET), (VAE.read, hub.SDXL_VAE))
    ]
    assert sizes == [(96, 128)] * 2
    with pytest.raises(CheckpointError, match=r"sample_size=\[96\] is not supported, only one whole number or two"):
        UNET.read(ConfigReader(hub.SDXL_UNET | {"sample_size": [96]}, "config.json"))


def test_a_long_list_is_named_in_a_short_sentence():
    with pytest.raises(CheckpointError, match=r"trained_betas=\[0\.1, .* \.\.\. is not supported") as caught:
        schedulers.read(ConfigReader(PNDM | {"trained_betas": [0.1] * 1000}, "scheduler_config.json"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_quantised_weights_are_refused_with_what_makes_them_readable(method):
    quantised = {"quantization_config": {"quant_method": method, "bits": 4}}
    for read, values in ((find_family("llama", "x").read, hub.LLAMA_32_1B_INSTRUCT), (UNET.read, hub.SDXL_UNET)):
        with pytest.raises(CheckpointError, match=rf"quantised \({method}\), which are not read: load the checkpoint"):
            read(ConfigReader(values | quantised, "config.json"))


def test_the_table_of_keys_has_every_class_once_and_no_other():
    """A family whose class it lacks would end in a KeyError, and what it has beyond them nobody would read."""
    parts = {PARTS[name].classes[0] for kind in KINDS for name in kind.parts if name in PARTS}
    decoders = {family.architecture for family in FAMILIES.values()}
    assert set(CLASSES) == parts | decoders | {*schedulers._FAMILIES, schedulers._FLOW}
