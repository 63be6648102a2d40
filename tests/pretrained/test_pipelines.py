"""Pipelines of diffusers as components and back: pictures, latents, weights and configurations."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sysdpo_jax import pretrained
from sysdpo_jax.components import Diffusion, FlowMatching, FrozenText
from sysdpo_jax.components.codec import whole_frames
from sysdpo_jax.diffusion.samplers import Euler
from sysdpo_jax.pretrained import CheckpointError
from tests.components.painters import arrays_in
from tests.models.programs import compiling
from tests.pretrained.checkpoints import PIPELINES

# diffusers' Euler scheduler makes an array of a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
KEY = jax.random.key(0)
CAPTIONS = ["a red ball", "two blue cubes"]


def pictures(pipe, component, **settings):
    """Those of diffusers from the noise that the component draws with `KEY`."""
    noise = np.array(jax.random.normal(KEY, (2, *component.codec.latent_shape)))
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    return pipe(prompt=CAPTIONS, latents=latents, output_type="np", **settings).images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`{name: (diffusers' pipeline, its folder)}`, each built once."""
    pipelines = {}

    def get(name):
        if name not in pipelines:
            torch.manual_seed(0)
            pipe = PIPELINES[name]()
            folder = tmp_path_factory.mktemp("pipelines") / name.replace(" ", "_")
            pipe.save_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            pipelines[name] = pipe, folder
        return pipelines[name]

    return get


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("sd2", "sdxl") else name for name in PIPELINES]
)
def test_pictures_equal_those_of_diffusers(name, made):
    """The whole way from caption to picture, with guidance and a negative prompt: 1e-3 of pixels in [0, 1].

    Looser than one forward pass (1e-4, in tests/parity): guidance multiplies the rounding of a step by its scale, the
    steps add up, and the autoencoder's decoder follows.
    """
    pipe, folder = made(name)
    component, params = pretrained.load(folder, num_steps=4, guidance_scale=3.0, negative_prompt="green")
    assert isinstance(component, FlowMatching if name.startswith("sd3") else Diffusion)
    ours = np.stack(component.sample(params, {"caption": CAPTIONS}, KEY))
    limit = {"max_sequence_length": 256} if name == "sd3" else {}
    settings = {"negative_prompt": ["green"] * 2, "num_inference_steps": 4, "guidance_scale": 3.0, **limit}
    theirs = pictures(pipe, component, height=16, width=16, **settings)
    assert np.ptp(theirs) > 0.3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_loading_compiles_nothing(name, made):
    """No parameter is drawn to be replaced, and nothing of a model runs."""
    folder = made(name)[1]
    with compiling() as programs:
        pretrained.load(folder)
    assert not programs


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd1", "sdxl"))])
def test_pictures_that_are_not_square_equal_those_of_diffusers(name, made):
    """Another height than width, as the first of several sizes; a picture of that shape is encoded in it."""
    pipe, folder = made(name)
    component, params = pretrained.load(folder, num_steps=2, guidance_scale=1.0, image_size=[[16, 24], [16, 16]])
    assert component.codec.sizes == ((16, 24), (16, 16))
    ours = np.stack(component.sample(params, {"caption": CAPTIONS}, KEY))
    theirs = pictures(pipe, component, height=16, width=24, num_inference_steps=2, guidance_scale=1.0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    raw = component.prepare([np.zeros((30, 50, 3), np.uint8)], {"caption": ["a"]})
    features = component.encode(params, raw)
    assert features["latents"].shape == (1, *component.codec.latent_shape)
    if name == "sdxl":
        np.testing.assert_array_equal(raw["frames"], [[30, 50, 0, 1, 16, 24]])
    square = component.prepare([np.zeros((30, 32, 3), np.uint8)], {"caption": ["a"]})
    assert square["pixels"].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_no_field_of_a_component_holds_an_array(name, made):
    """Loading twice with other weights gives equal components, which are one to what is compiled."""
    _, folder = made(name)
    component, params = pretrained.load(folder)
    assert [*arrays_in(component, name)] == []
    assert jax.tree.map(np.shape, jax.eval_shape(component.init, KEY)) == jax.tree.map(np.shape, params)
    again, _ = pretrained.load(folder)
    assert again == component
    assert hash(again) == hash(component)


def test_what_the_parameters_hold_is_what_is_saved(made, tmp_path):
    """Another autoencoder and text encoder in the parameters are those of the written pipeline."""
    pipe, folder = made("sd1")
    component, params = pretrained.load(folder)
    moved = params | {name: jax.tree.map(lambda x: x + 1, params[name]) for name in ("codec", "text")}
    pretrained.save(tmp_path / "out", component, moved)
    for part in ("vae", "text_encoder", "unet"):
        [file] = (tmp_path / "out" / part).glob("*.safetensors")
        theirs = pipe.components[part].state_dict()
        for key, tensor in load_file(file).items():
            expected = theirs[key if key in theirs else key.removeprefix("text_model.")]
            assert torch.equal(tensor, expected if part == "unet" else expected + 1), (part, key)


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow), "sd3"])
def test_without_a_negative_prompt_guidance_leads_away_from_the_null_condition(name, made):
    """SDXL's is all zeros, the others' that of the empty caption, as in diffusers. Tolerance as above."""
    pipe, folder = made(name)
    component, params = pretrained.load(folder, num_steps=2, guidance_scale=5.0)
    ours = np.stack(component.sample(params, {"caption": CAPTIONS}, KEY))
    noise = np.array(jax.random.normal(KEY, (2, *component.codec.latent_shape)))
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    theirs = pipe(prompt=CAPTIONS, latents=latents, **options).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3"))])
@pytest.mark.parametrize("scale", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_guidance_scale_of_at_most_one_is_none_as_in_diffusers(name, scale, made):
    """0.0 is what the cards of SDXL-Turbo and Stable Diffusion 3.5 Large Turbo ask for. Tolerance as above."""
    pipe, folder = made(name)
    component, params = pretrained.load(folder, num_steps=1, guidance_scale=scale)
    ours = np.stack(component.sample(params, {"caption": CAPTIONS}, KEY))
    noise = np.array(jax.random.normal(KEY, (2, *component.codec.latent_shape)))
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    options = {"num_inference_steps": 1, "guidance_scale": scale, "height": 16, "width": 16, "output_type": "np"}
    theirs = pipe(prompt=CAPTIONS, latents=latents, **options).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_latents_are_the_scaled_means_of_the_autoencoder(name, made):
    pipe, folder = made(name)
    component, params = pretrained.load(folder)
    images = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))
    features = component.encode(params, component.prepare(images, {"caption": ["a"] * 5}))
    with torch.no_grad():
        pixels = torch.tensor(np.stack(images).transpose(0, 3, 1, 2)) / 255 * 2 - 1
        config = pipe.vae.config
        mean = pipe.vae.encode(pixels).latent_dist.mode()
        expected = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
    np.testing.assert_allclose(features["latents"], expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-4)
    # A picture that was sampled is that of the file which holds it.
    floats = component.prepare([image / 255 for image in images], {"caption": ["a"] * 5})
    np.testing.assert_array_equal(floats["pixels"], np.stack(images))


def test_sdxl_is_told_how_its_pictures_were_cut(made):
    _, folder = made("sdxl")
    component, _ = pretrained.load(folder)
    features = component.prepare([np.zeros((20, 40, 3)), np.zeros((16, 16, 3))], {"caption": ["a", "b"]})
    np.testing.assert_array_equal(features["frames"], [[20, 40, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16]])


@pytest.mark.parametrize("name", PIPELINES)
def test_the_round_trip_is_exact_and_silent(name, made, tmp_path, library_log):
    """The libraries report no missing and no unexpected tensor, and no key of a configuration that they do not know."""
    pipe, folder = made(name)
    component, params = pretrained.load(folder)
    pretrained.save(tmp_path / "out", component, params)
    library_log.clear()
    # diffusers wants to be told of a missing T5, for its own checkpoints as well.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3 without T5" else {}
    again = type(pipe).from_pretrained(tmp_path / "out", **absent)
    assert [message for message in library_log if "torchvision" not in message] == []
    for part, model in pipe.components.items():
        found = again.components[part]
        if isinstance(model, torch.nn.Module):
            theirs, ours = model.state_dict(), found.state_dict()
            assert set(theirs) == set(ours), part
            for key in theirs:
                assert torch.equal(theirs[key], ours[key]), (part, key)
        if model is None:
            assert found is None, part
    assert type(again.scheduler) is type(pipe.scheduler)
    for scheduler in (again.scheduler, pipe.scheduler):
        scheduler.set_timesteps(7)
    assert torch.equal(again.scheduler.timesteps, pipe.scheduler.timesteps)


@pytest.mark.slow
def test_text_encoders_can_be_trained(made):
    _, folder = made("sdxl")
    frozen, weights = pretrained.load(folder)
    trained, more = pretrained.load(folder, train_text=True)
    assert set(weights) == set(more) == {"denoiser", "codec", "text"}
    assert set(more["text"]) == {"text_encoder", "text_encoder_2"}
    assert isinstance(frozen.text, FrozenText)
    assert (frozen.frozen, trained.frozen) == (("codec", "text"), ("codec",))
    assert jax.tree.map(np.shape, jax.eval_shape(trained.init, KEY)) == jax.tree.map(np.shape, more)
    assert jax.tree.map(np.shape, jax.eval_shape(frozen.init, KEY)) == jax.tree.map(np.shape, weights)
    images = list(np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32))
    values = [
        jax.jit(component.log_prob)(
            params, component.encode(params, component.prepare(images, {"caption": CAPTIONS})), KEY
        )
        for component, params in ((frozen, weights), (trained, more))
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    features = trained.encode(more, trained.prepare(images, {"caption": CAPTIONS}))
    gradient = jax.jit(jax.grad(lambda p: trained.log_prob(p, features, KEY).sum() / 50_000))(more)
    for name in ("text_encoder", "text_encoder_2"):
        assert max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient["text"][name])) > 0


@pytest.mark.slow
def test_long_captions_are_refused_or_cut_and_counted(made):
    _, folder = made("sd1")
    caption = "a" * 3 + " red" * 30
    images = [np.zeros((16, 16, 3))] * 2
    component, params = pretrained.load(folder)
    with pytest.raises(ValueError, match="caption in row 1 has 35 tokens, more than the 24"):
        component.prepare(images, {"caption": ["a", caption]})
    component, params = pretrained.load(folder, truncation="keep_start")
    features = component.encode(params, component.prepare(images, {"caption": ["a", caption]}))
    _, metrics = component.log_prob_with_metrics(params, features, KEY)
    np.testing.assert_array_equal(metrics["truncated"], [0, 1])


def test_what_a_pipeline_must_not_be(made, tmp_path):
    _, folder = made("sd1")
    index = json.loads((folder / "model_index.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for change, message in (
        ({"_class_name": "KandinskyPipeline"}, "KandinskyPipeline is not supported"),
        ({"image_encoder": ["transformers", "X"]}, "image_encoder=.* is not supported"),
        ({"motion_adapter": ["diffusers", "X"]}, "keys that are not known here .*motion_adapter"),
        ({"text_encoder": [None, None]}, "has no text_encoder: fetch the whole pipeline"),
    ):
        (copy / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(CheckpointError, match=message):
            pretrained.load(copy)


def test_a_tokenizer_without_its_vocabulary_is_refused(made, tmp_path):
    """transformers loads it all the same, with two tokens."""
    _, folder = made("sd1")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer has \d tokens but its text encoder 56|holds no tokenizer"):
        pretrained.load(tmp_path / "copy")


@pytest.mark.slow
def test_half_precision_and_variants_are_read_and_written_as_they_are(made, tmp_path):
    """fp16 weights beside a float32 autoencoder, which has no fp16 file; each part comes back in its own precision."""
    pipe, folder = made("sdxl")
    half = copy.deepcopy(pipe).to(torch.float16)
    half.save_pretrained(tmp_path / "in", variant="fp16")
    shutil.rmtree(tmp_path / "in" / "vae")
    shutil.copytree(folder / "vae", tmp_path / "in" / "vae")
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.safetensors .*: pass variant='fp16'"):
        pretrained.load(tmp_path / "in")
    component, params = pretrained.load(tmp_path / "in", variant="fp16")
    found = {name: {x.dtype.name for x in jax.tree.leaves(tree)} for name, tree in params.items()}
    assert found == {"denoiser": {"float16"}, "codec": {"float32"}, "text": {"float16"}}
    pretrained.save(tmp_path / "out", component, params)
    again = type(pipe).from_pretrained(tmp_path / "out")
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        theirs = (pipe if part == "vae" else half).components[part].state_dict()
        files = load_file(next((tmp_path / "out" / part).glob("*.safetensors")))
        assert again.components[part] is not None
        for name, tensor in files.items():
            key = name if name in theirs else name.removeprefix("text_model.")
            assert torch.equal(tensor, theirs[key]), (part, name)
            assert tensor.dtype == theirs[key].dtype


def test_frames_of_made_pictures_are_whole(made):
    _, folder = made("sd1")
    component, _ = pretrained.load(folder)
    np.testing.assert_array_equal(whole_frames(component.codec, 1), [[16, 16, 0, 0, 16, 16]])


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def annotate(folder):
    """Keys and files of other programs, laid out in another way than the library does."""
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 16}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2")
    extra = {
        "model_index.json": {"_name_or_path": "someone", "feature_extractor": ["transformers", "CLIPImageProcessor"]},
        "text_encoder/config.json": {"_name_or_path": "clip", "transformers_version": "4.1"},
        "unet/config.json": {"_diffusers_version": "0.1"},
        "vae/config.json": {"_name_or_path": "vae"},
        "scheduler/scheduler_config.json": {"clip_sample": False, "sample_max_value": 1.0},
    }
    for name, values in extra.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values, indent=7))


def test_a_pipelines_files_go_out_as_they_came_though_the_folder_is_gone(made, tmp_path):
    _, folder = made("sd1")
    shutil.copytree(folder, tmp_path / "in")
    annotate(tmp_path / "in")
    before = files(tmp_path / "in")
    component, params = pretrained.load(tmp_path / "in")
    component.text.text.tokenizer(["a red ball"], padding="max_length", truncation=True, max_length=9)
    shutil.rmtree(tmp_path / "in")
    pretrained.save(tmp_path / "out", component, params)
    after = files(tmp_path / "out")
    assert set(after) == set(before)
    assert after["scheduler/scheduler_config.json"] == before["scheduler/scheduler_config.json"]
    for name in before:
        if name.endswith("config.json") or name == "model_index.json":
            theirs, ours = json.loads(before[name]), json.loads(after[name])
            # Fixtures of transformers 5: their tokenizers are put into words that older versions read.
            left_out = {"backend", "tokenizer_class", "extra_special_tokens"} if name.startswith("tokenizer") else set()
            assert {key: ours.get(key) for key in theirs if key not in left_out} == {
                key: value for key, value in theirs.items() if key not in left_out
            }, name
        elif not name.endswith("safetensors"):
            assert after[name] == before[name], name


def test_what_was_changed_in_a_pipeline_is_written_anew(made, tmp_path, library_log):
    """Another sampler and another tokenizer: diffusers makes both of the folder, and says nothing."""
    pipe, folder = made("sd1")
    component, params = pretrained.load(folder, sampler=Euler("trailing", 1))
    component.text.text.tokenizer.add_special_tokens({"additional_special_tokens": ["<style>"]})
    pretrained.save(tmp_path / "out", component, params)
    library_log.clear()
    again = type(pipe).from_pretrained(tmp_path / "out")
    assert [message for message in library_log if "torchvision" not in message] == []
    assert type(again.scheduler).__name__ == "EulerDiscreteScheduler"
    assert again.scheduler.config.timestep_spacing == "trailing"
    # A key of the class before, for whoever goes back to it.
    assert again.scheduler.config.skip_prk_steps is True
    text = "red <style> ball"
    assert again.tokenizer(text)["input_ids"] == component.text.text.tokenizer(text)["input_ids"]
    assert len(again.tokenizer) == len(pipe.tokenizer) + 1
