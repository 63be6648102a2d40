"""Parts of a pipeline from elsewhere, or left out, at load: as diffusers' from_pretrained with the same arguments."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch

from sysdpo_jax import pretrained
from sysdpo_jax.pretrained import CheckpointError
from tests.pretrained.checkpoints import clip, stable_diffusion_1, stable_diffusion_3, unet, vae

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
KEY = jax.random.key(0)
CAPTIONS = ["a red ball", "two blue cubes"]


def written(pipe, folder):
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    torch.manual_seed(0)
    return written(stable_diffusion_1(), tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    torch.manual_seed(1)
    return written(stable_diffusion_3(), tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Parts with other weights than the pipelines have, and another scheduler."""
    folder = tmp_path_factory.mktemp("others")
    torch.manual_seed(2)
    for name, part in {"vae": vae(scaling_factor=0.5), "unet": unet(), "text_encoder": clip(False)}.items():
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1.25)
        part.save_pretrained(folder / name)
    betas = {"beta_schedule": "scaled_linear", "beta_end": 0.01}
    diffusers.DDIMScheduler(**betas, clip_sample=False, steps_offset=1).save_pretrained(folder / "scheduler")
    return folder


def check_pictures(component, params, pipe, **settings):
    """1e-3 of pixels in [0, 1], as in test_pipelines.py."""
    pipe.set_progress_bar_config(disable=True)
    ours = np.stack(component.sample(params, {"caption": CAPTIONS}, KEY))
    noise = np.array(jax.random.normal(KEY, (2, *component.codec.latent_shape)))
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "np"}
    theirs = pipe(prompt=CAPTIONS, latents=latents, **options | settings).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    return ours


def test_parts_from_elsewhere_make_diffusers_pictures_and_are_what_is_saved(sd1, others, tmp_path):
    parts = {name: str(others / name) for name in ("unet", "vae", "text_encoder", "scheduler")}
    component, params = pretrained.load(sd1, parts=parts, num_steps=2, guidance_scale=1.0)
    given = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(others / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(others / "vae"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(others / "scheduler"),
        "text_encoder": diffusers.StableDiffusionPipeline.from_pretrained(sd1).text_encoder.from_pretrained(
            others / "text_encoder"
        ),
    }
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd1, **given)
    made = check_pictures(component, params, pipe)
    own, own_params = pretrained.load(sd1, num_steps=2, guidance_scale=1.0)
    assert np.abs(made - np.stack(own.sample(own_params, {"caption": CAPTIONS}, KEY))).max() > 0.01

    pretrained.save(tmp_path / "out", component, params)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(again.scheduler) is diffusers.DDIMScheduler
    assert again.vae.config.scaling_factor == 0.5
    for name in ("unet", "vae", "text_encoder"):
        theirs, ours = given[name].state_dict(), again.components[name].state_dict()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name


def test_a_whole_pipeline_stands_for_its_part(sd1, others, tmp_path):
    shutil.copytree(sd1, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "vae")
    shutil.copytree(others / "vae", tmp_path / "other" / "vae")
    component, _ = pretrained.load(sd1, parts={"vae": tmp_path / "other"})
    assert component.codec.autoencoder.config.scaling_factor == 0.5
    shutil.rmtree(tmp_path / "other" / "unet")
    with pytest.raises(CheckpointError, match=r"there is no folder .*unet, .*parts={'unet': 'path/to/unet'}"):
        pretrained.load(tmp_path / "other")
    component, _ = pretrained.load(tmp_path / "other", parts={"unet": others / "unet"})
    assert component.codec.autoencoder.config.scaling_factor == 0.5


@pytest.mark.parametrize("parts", [{"text_encoder_3": None}, {"text_encoder_3": None, "tokenizer_3": None}])
def test_t5_can_be_left_out_as_in_diffusers(parts, sd3, tmp_path):
    component, params = pretrained.load(sd3, parts=parts, num_steps=2, guidance_scale=1.0)
    assert component.text.text.encoder_3 is None
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3, **absent)
    if len(parts) == 1:
        check_pictures(component, params, pipe)
        return
    pretrained.save(tmp_path / "out", component, params)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (tmp_path / "out" / "text_encoder_3").exists()
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **absent)
    assert again.text_encoder_3 is None
    # Put in again where it is wanted.
    both = {name: sd3 / name for name in absent}
    component, _ = pretrained.load(tmp_path / "out", parts=both)
    assert component.text.text.encoder_3 is not None
    with pytest.raises(CheckpointError, match=r"has no tokenizer_3: fetch .*parts={'tokenizer_3'"):
        pretrained.load(tmp_path / "out", parts={"text_encoder_3": sd3 / "text_encoder_3"})


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        (
            "sd1",
            {"text_encoder_3": None},
            "a StableDiffusionPipeline has no 'text_encoder_3', only unet, vae, scheduler",
        ),
        ("sd1", {"safety_checker": None}, "has no 'safety_checker', only unet"),
        ("sd1", {"vae": None}, "cannot do without vae; nothing of it can be left out"),
        ("sd3", {"transformer": None}, "cannot do without transformer; only text_encoder_3 with tokenizer_3"),
        ("sd3", {"tokenizer_3": None}, "are left out together"),
        ("sd3", {"text_encoder_3": None, "tokenizer_3": "x"}, "are left out together"),
        ("sd1", {"vae": 3}, "vae is 3: give the path of a folder"),
        ("sd1", {"vae": "./nowhere"}, "there is no folder or file './nowhere'"),
        ("sd1", "vae", "parts='vae' is no mapping"),
    ],
)
def test_what_cannot_be_replaced_or_left_out_is_refused_with_what_can(name, parts, message, request):
    with pytest.raises(CheckpointError, match=message):
        pretrained.load(request.getfixturevalue(name), parts=parts)


def test_a_part_that_does_not_fit_is_refused_before_weights_are_read(sd1, tmp_path):
    vae(16).save_config(tmp_path / "vae")
    with pytest.raises(
        CheckpointError, match=rf"in_channels=4, but {tmp_path}/vae/config\.json has latent_channels=16"
    ):
        pretrained.load(sd1, parts={"vae": tmp_path / "vae"})
    unet(cross_attention_dim=24).save_config(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"cross_attention_dim=24, but .* is 16"):
        pretrained.load(sd1, parts={"unet": tmp_path / "unet"})


def test_an_adapter_beside_a_part_or_a_pipeline_is_refused(sd1, tmp_path):
    """transformers applies the one in a text encoder's folder; which is meant of the others, nobody knows."""
    shutil.copytree(sd1, tmp_path / "copy")
    for place in ("text_encoder", "unet", "."):
        name = "pytorch_lora_weights.safetensors" if place == "." else "adapter_config.json"
        (tmp_path / "copy" / place / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"an adapter beside the model .{name}.*merge the two"):
            pretrained.load(tmp_path / "copy")
        (tmp_path / "copy" / place / name).unlink()


def test_a_variant_that_no_part_has_is_refused_and_shards_of_one_are_read(sd1, tmp_path):
    """The plain weights would be another model than the one that was asked for."""
    with pytest.raises(CheckpointError, match=r"no part of .* has weights of the variant 'fp61'"):
        pretrained.load(sd1, variant="fp61")
    shutil.copytree(sd1, tmp_path / "copy")
    model = diffusers.UNet2DConditionModel.from_pretrained(sd1 / "unet").to(torch.float16)
    model.save_pretrained(tmp_path / "copy" / "unet", variant="fp16", max_shard_size="40KB")
    assert (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    _, plain = pretrained.load(tmp_path / "copy")
    _, half = pretrained.load(tmp_path / "copy", variant="fp16")
    assert {x.dtype.name for x in jax.tree.leaves(plain)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(half["denoiser"])} == {"float16"}
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pass variant='fp16'"):
        pretrained.load(tmp_path / "copy")


def test_captions_are_padded_to_the_length_that_the_tokenizer_states(sd1, tmp_path):
    """Shorter than the encoder has room for, as diffusers does it."""
    shutil.copytree(sd1, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 16}))
    component, params = pretrained.load(tmp_path / "copy", num_steps=2, guidance_scale=1.0)
    assert component.text.text.length == 16
    check_pictures(component, params, diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "copy"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 512}))
    with pytest.raises(CheckpointError, match=r"model_max_length=512, but .* max_position_embeddings=24"):
        pretrained.load(tmp_path / "copy")
