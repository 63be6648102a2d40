"""Whether the parts of a pipeline fit each other, by their configurations alone: the released ones do."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.image_models import MMDIT, PARTS
from sysdpo_jax.pretrained.kinds import SD, SD3, SDXL, check_fit, check_patches
from sysdpo_jax.pretrained.tokenizer_files import caption_length, check_vocabulary
from tests.pretrained import hub_configs as hub
from tests.pretrained.test_sd3_configs import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, T5_XXL

PROJECTED = hub.SD15_CLIP | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768}
SD15 = {"unet": hub.SD15_UNET, "vae": hub.SD15_VAE, "text_encoder": hub.SD15_CLIP}
SD21 = {"unet": hub.SD21_UNET, "vae": hub.SD15_VAE, "text_encoder": hub.SD21_CLIP}
XL = {"unet": hub.SDXL_UNET, "vae": hub.SDXL_VAE, "text_encoder": hub.SD15_CLIP, "text_encoder_2": hub.SDXL_CLIP_2}
THREE = {"transformer": SD3_MEDIUM, "vae": hub.SD3_VAE, "text_encoder": PROJECTED}
THREE |= {"text_encoder_2": hub.SDXL_CLIP_2, "text_encoder_3": T5_XXL}
WITHOUT_T5 = {name: values for name, values in THREE.items() if name != "text_encoder_3"}


def check(kind, parts):
    configs = {name: PARTS[name].read(ConfigReader(values, f"{name}/config.json")) for name, values in parts.items()}
    check_fit(kind, configs, {name: Path(name) for name in parts})


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (SD, SD15),
        (SD, SD21),
        (SDXL, XL),
        (SD3, THREE),
        (SD3, THREE | {"transformer": SD35_MEDIUM}),
        (SD3, THREE | {"transformer": SD35_LARGE}),
        (SD3, WITHOUT_T5),
    ],
)
def test_the_parts_of_released_pipelines_fit(kind, parts):
    check(kind, parts)


@pytest.mark.parametrize(
    ("kind", "parts", "part", "change", "message"),
    [
        (
            SD,
            SD15,
            "unet",
            {"cross_attention_dim": 1024},
            r"unet/config\.json has cross_attention_dim=1024, but hidden_size of text_encoder/config\.json is 768",
        ),
        (
            SD,
            SD15,
            "unet",
            {"in_channels": 9},
            r"in_channels=9, but vae/config\.json has latent_channels=4 .*inpainting",
        ),
        (SD, SD15, "unet", {"in_channels": 8}, r"in_channels=8, but .*latent_channels=4 .*InstructPix2Pix"),
        (SD, SD15, "unet", {"in_channels": 7}, r"in_channels=7, but vae/config\.json has latent_channels=4\."),
        (SD, SD15, "unet", {"out_channels": 8}, "out_channels=8, but .*latent_channels=4"),
        (SD, SD15, "vae", {"latent_channels": 16}, "in_channels=4, but .*latent_channels=16"),
        (SD, SD15, "vae", {"in_channels": 4}, r"vae/config\.json has in_channels=4, but pictures have 3"),
        (SD, SD15, "vae", {"out_channels": 1}, r"vae/config\.json has out_channels=1, but pictures have 3"),
        (SD, SD21, "text_encoder", hub.SD15_CLIP, "cross_attention_dim=1024, but .* is 768"),
        (
            SD,
            SD15,
            "unet",
            hub.SDXL_UNET | {"cross_attention_dim": 768},
            "addition_embed_type='text_time', but that of",
        ),
        (SDXL, XL, "unet", {"cross_attention_dim": 1280}, "cross_attention_dim=1280, but .* together is 2048"),
        (SDXL, XL, "unet", {"addition_embed_type": None}, "addition_embed_type=None, but that of .* is 'text_time'"),
        (
            SDXL,
            XL,
            "unet",
            {"projection_class_embeddings_input_dim": 2560},
            r"input_dim=2560, but projection_dim of text_encoder_2/config\.json is 1280 and 6 times .* 1536",
        ),
        (SDXL, XL, "text_encoder_2", {"projection_dim": 768}, "input_dim=2816, but projection_dim .* is 768"),
        (
            SDXL,
            XL,
            "text_encoder_2",
            {"architectures": ["CLIPTextModel"]},
            r"text_encoder_2/config\.json is of a CLIPTextModel, .* needs a CLIPTextModelWithProjection",
        ),
        (SD3, THREE, "transformer", {"joint_attention_dim": 2048}, "joint_attention_dim=2048, but .* d_model=4096"),
        (
            SD3,
            WITHOUT_T5,
            "transformer",
            {"joint_attention_dim": 1024},
            "dim=1024, but .* together is 2048, which is more",
        ),
        (SD3, THREE, "transformer", {"pooled_projection_dim": 1280}, "pooled_projection_dim=1280, but .* is 2048"),
        (SD3, THREE, "transformer", {"in_channels": 33}, "in_channels=33, but .*latent_channels=16 .*inpainting"),
        (SD3, THREE, "text_encoder", hub.SD15_CLIP, "is of a CLIPTextModel, but a StableDiffusion3Pipeline needs"),
        (SD3, THREE, "vae", hub.SDXL_VAE, "in_channels=16, but .*latent_channels=4"),
    ],
)
def test_parts_that_do_not_fit_are_named_with_both_numbers_and_the_remedy(kind, parts, part, change, message):
    with pytest.raises(CheckpointError, match=f"{message}.*parts=") as caught:
        check(kind, parts | {part: parts[part] | change})
    assert str(caught.value).startswith(f"the parts of this {kind.name} do not fit each other: ")


def test_all_misfits_are_named_at_once():
    with pytest.raises(CheckpointError, match=r"in_channels=5.*; .*cross_attention_dim=64"):
        check(SD, SD15 | {"unet": hub.SD15_UNET | {"in_channels": 5, "cross_attention_dim": 64}})


def clips(*limits, positions=77):
    encoder = SimpleNamespace(max_position_embeddings=positions)
    return [(Path(f"tokenizer_{i}"), SimpleNamespace(model_max_length=n), encoder) for i, n in enumerate(limits, 1)]


def test_captions_have_the_length_that_the_tokenizers_state():
    assert caption_length(clips(77, 77)) == 77
    assert caption_length(clips(40)) == 40
    assert caption_length(clips(int(1e30), 77)) == 77  # No tokenizer_config.json states one.
    with pytest.raises(
        CheckpointError, match=r"tokenizer_1/tokenizer_config\.json has model_max_length=512, but .*=77"
    ):
        caption_length(clips(512))
    with pytest.raises(CheckpointError, match="tokenizer_1 of 77 but tokenizer_2 of 40: set them to the same number"):
        caption_length(clips(77, 40))


def test_a_tokenizer_of_another_model_is_refused_and_added_tokens_are_not():
    """Gemma 3's tokenizer has a token for images beyond the vocabulary, fine-tuned Llamas a padding token."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "[PAD]": 2}, added_tokens_decoder={2: "[PAD]"})
    check_vocabulary(tokenizer, 2, "model")
    with pytest.raises(CheckpointError, match="in model has 1 tokens beyond the model's vocab_size=1, such as 'b'"):
        check_vocabulary(tokenizer, 1, "model")


def test_pictures_that_the_table_of_positions_does_not_cover_are_refused():
    transformer = MMDIT.read(ConfigReader(SD3_MEDIUM, "config.json"))
    check_patches(transformer, 128.0, 128.0, "config.json")
    check_patches(transformer, 384.0, 2.0, "config.json")
    for height, width in ((386.0, 128.0), (127.0, 128.0), (128.5, 128.0)):
        with pytest.raises(CheckpointError, match=r"patch_size=2, .* pos_embed_max_size=192, so that at most 384 fit"):
            check_patches(transformer, height, width, "config.json")
