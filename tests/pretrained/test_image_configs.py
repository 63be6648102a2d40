"""Configurations of U-Nets, autoencoders and CLIP: the hub's are read, what is not supported is refused."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, read_json
from sysdpo_jax.pretrained.image_models import CLIP, UNET, VAE
from sysdpo_jax.pretrained.names import tensors_of
from sysdpo_jax.pretrained.params import load_params, stored_tensors
from sysdpo_jax.pretrained.tensors import Safetensors
from tests.pretrained import hub_configs as hub

UNETS = {"SD 1.5": hub.SD15_UNET, "SD 2.1": hub.SD21_UNET, "SDXL": hub.SDXL_UNET}
AUTOENCODERS = {"SD 1.5": hub.SD15_VAE, "SDXL": hub.SDXL_VAE, "SD3": hub.SD3_VAE}
ENCODERS = {"SD 1.5": hub.SD15_CLIP, "SD 2.1": hub.SD21_CLIP, "SDXL 2": hub.SDXL_CLIP_2}
EVERY = [(UNET, c) for c in UNETS.values()] + [(VAE, c) for c in AUTOENCODERS.values()]
EVERY += [(CLIP, c) for c in ENCODERS.values()]
# Parameters that the published models have.
SIZES = {"SD 1.5": 859_520_964, "SD 2.1": 865_910_724, "SDXL": 2_567_463_684}


def read(family, values):
    return family.read(ConfigReader(values, "config.json"))


def stored_shapes(family, config, module, *inputs, method="__call__"):
    """Names and shapes of the tensors that our module's parameters are stored as; nothing is allocated."""
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    made = jax.eval_shape(lambda key, *args: module.init(key, *args, method=method), jax.random.key(0), *args)["params"]
    leaves = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(made)}
    naming = family.naming(config)
    return {
        tensor.name: tensor.shape(shape if tensor.layer is None else shape[1:])
        for path, shape in leaves.items()
        for tensor in tensors_of(path, shape, naming)
    }


def torch_shapes(make):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in make().named_parameters()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "SDXL")) for name in UNETS])
def test_a_published_unet_is_diffusers_tensor_for_tensor(name):
    config = read(UNET, UNETS[name])
    inputs = [((1, 8, 8, 4), jnp.float32), ((1,), jnp.int32), ((1, 77, config.cross_attention_dim), jnp.float32)]
    if config.addition_embed_type:
        inputs += [((1, 1280), jnp.float32), ((1, 6), jnp.int32)]
    found = stored_shapes(UNET, config, UNet2DCondition(config), *inputs)
    assert found == torch_shapes(lambda: diffusers.UNet2DConditionModel.from_config(UNETS[name]))
    assert sum(torch.Size(shape).numel() for shape in found.values()) == SIZES[name]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_published_autoencoder_is_diffusers_tensor_for_tensor(name):
    config = read(VAE, AUTOENCODERS[name])
    found = stored_shapes(VAE, config, AutoencoderKL(config), ((1, 16, 16, 3), jnp.float32))
    assert found == torch_shapes(lambda: diffusers.AutoencoderKL.from_config(AUTOENCODERS[name]))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_published_text_encoder_is_transformers_tensor_for_tensor(name):
    """Under the names with "text_model.", which transformers reads whether or not it writes them."""
    values = ENCODERS[name]
    config = read(CLIP, values)
    found = stored_shapes(CLIP, config, CLIPTextEncoder(config), ((1, 77), jnp.int32))
    kind = getattr(transformers, values["architectures"][0])
    expected = torch_shapes(lambda: kind(transformers.CLIPTextConfig(**values)))
    [(pattern, prefix)] = CLIP.naming(config).aliases
    assert found == {re.sub(pattern, prefix, tensor): shape for tensor, shape in expected.items()}


def test_the_blocks_of_sdxl():
    config = read(UNET, hub.SDXL_UNET)
    assert (config.heads, config.depths) == ((5, 10, 20), (1, 2, 10))
    assert (config.addition_embed_type, config.addition_time_embed_dim) == ("text_time", 256)
    assert (config.sample_size, config.upcast_attention) == (128, False)
    assert read(UNET, hub.SD15_UNET).heads == (8, 8, 8, 8)


@pytest.mark.parametrize(("family", "values"), EVERY)
def test_what_is_written_is_read_again_and_means_the_same_to_the_library(family, values):
    config = read(family, values)
    written = family.write(config)
    assert read(family, written) == config
    if family is CLIP:
        theirs = transformers.CLIPTextConfig(**written)
        shape = {"dtype", "param_dtype", "with_projection"}
        assert all(getattr(theirs, name) == value for name, value in vars(config).items() if name not in shape)
        return
    kind = getattr(diffusers, values["_class_name"])
    with torch.device("meta"):
        first, second = (dict(kind.from_config(v).config) for v in (values, written))
    # SDXL's null and false are the same; where a configuration came from is not written.
    first, second = (v | {"upcast_attention": bool(v.get("upcast_attention"))} for v in (first, second))
    names = (set(first) | set(second)) - {"_name_or_path", "_use_default_values", "_diffusers_version"}
    as_lists = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731
    assert {n: as_lists(first.get(n)) for n in names} == {n: as_lists(second.get(n)) for n in names}


def test_what_todays_libraries_save_is_read(tmp_path):
    """save_pretrained writes every setting, with its default where nothing was said."""
    small = {"block_out_channels": (8,), "norm_num_groups": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    model = diffusers.UNet2DConditionModel(**small, **blocks, attention_head_dim=2, cross_attention_dim=8)
    model.save_config(tmp_path / "unet")
    diffusers.AutoencoderKL(**small).save_config(tmp_path / "vae")
    shape = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**shape, bos_token_id=38, eos_token_id=39)
    )
    encoder.save_pretrained(tmp_path / "clip")
    kinds = {"unet": (UNET, UNetConfig), "vae": (VAE, AutoencoderConfig), "clip": (CLIP, CLIPTextConfig)}
    for name, (family, kind) in kinds.items():
        assert isinstance(read(family, read_json(tmp_path / name / "config.json")), kind)


def test_keys_that_older_versions_wrote_for_every_model_do_not_matter():
    older = transformers.CLIPTextConfig().to_dict() | {"architectures": ["CLIPTextModel"]}
    older |= {"is_decoder": False, "add_cross_attention": False, "num_beams": 1, "top_k": 50, "pruned_heads": {}}
    older |= {"torchscript": False, "bad_words_ids": None, "max_length": 20, "return_dict": True}
    assert read(CLIP, older) == CLIPTextConfig()


def test_tensors_under_the_names_of_older_and_newer_versions_are_found(tmp_path):
    """Attention named as in the first versions of diffusers, text encoders with and without "text_model."."""
    small = {"block_out_channels": (8,), "norm_num_groups": 4}
    vae = diffusers.AutoencoderKL(**small)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    config = read(VAE, json.loads(vae.to_json_string()))
    renamed = {re.sub("to_[qkv]|to_out.0", lambda m: old[m[0]], k): v for k, v in vae.state_dict().items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in renamed
    written = loaded_and_written(tmp_path, VAE, config, AutoencoderKL(config), renamed, jnp.zeros((1, 8, 8, 3)))
    assert_same_tensors(written, vae.state_dict())

    shape = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    theirs = transformers.CLIPTextConfig(**shape, bos_token_id=38, eos_token_id=39)
    encoder = transformers.CLIPTextModelWithProjection(theirs)
    config = read(CLIP, theirs.to_dict() | {"architectures": ["CLIPTextModelWithProjection"]})
    for prefix in ("text_model.", ""):
        renamed = {prefix + k.removeprefix("text_model."): v for k, v in encoder.text_model.state_dict().items()}
        renamed["text_projection.weight"] = encoder.text_projection.weight.detach()
        written = loaded_and_written(
            tmp_path, CLIP, config, CLIPTextEncoder(config), renamed, jnp.zeros((1, 4), jnp.int32)
        )
        assert_same_tensors(written, encoder.state_dict())


def loaded_and_written(folder, family, config, module, tensors, inputs):
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), inputs))["params"]
    params = load_params(abstract, Safetensors(folder, "model"), family.naming(config))
    return dict(stored_tensors(params, family.naming(config)))


def assert_same_tensors(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("family", "values", "change"),
    [
        *(
            (UNET, hub.SDXL_UNET, change)
            for change in (
                {"act_fn": "gelu"},
                {"addition_embed_type": "image"},
                {"attention_type": "gated"},
                {"center_input_sample": True},
                {"class_embed_type": "timestep"},
                {"conv_in_kernel": 1},
                {"cross_attention_dim": [8, 8, 8]},
                {"cross_attention_norm": "layer_norm"},
                {"dropout": 0.1},
                {"dual_cross_attention": True},
                {"encoder_hid_dim": 4096},
                {"layers_per_block": [2, 2, 2]},
                {"mid_block_type": None},
                {"norm_num_groups": None},
                {"num_attention_heads": 8},
                {"only_cross_attention": [False, True, True]},
                {"only_cross_attention": True},
                {"resnet_time_scale_shift": "scale_shift"},
                {"time_cond_proj_dim": 256},
                {"time_embedding_type": "fourier"},
                {"transformer_layers_per_block": [1, [2, 2], 10]},
                {"_class_name": "UNet2DModel"},
                {"a_setting_of_tomorrow": 1},
            )
        ),
        *(
            (VAE, hub.SDXL_VAE, change)
            for change in (
                {"act_fn": "relu"},
                {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
                {"up_block_types": ["UpDecoderBlock2D"] * 3},
                {"latents_mean": [0.0] * 4},
                {"latents_std": [1.0] * 4},
                {"_class_name": "AutoencoderTiny"},
                {"a_setting_of_tomorrow": 1},
            )
        ),
        *(
            (CLIP, hub.SD15_CLIP, change)
            for change in (
                {"architectures": ["CLIPModel"]},
                {"attention_dropout": 0.1},
                {"eos_token_id": [2, 3]},
                {"hidden_act": "relu"},
                {"is_decoder": True},
                {"model_type": "clip"},
                {"a_setting_of_tomorrow": 1},
            )
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(family, values, change):
    [name] = change
    with pytest.raises(CheckpointError, match=f"config.json.*{name}"):
        read(family, values | change)


def test_a_configuration_that_describes_no_model_names_its_file():
    with pytest.raises(CheckpointError, match=r"config\.json describes no model: UNetConfig: unknown down_block_types"):
        read(UNET, hub.SDXL_UNET | {"down_block_types": ["AttnDownBlock2D"] * 3})
    with pytest.raises(CheckpointError, match=r"config\.json has no 'architectures'"):
        read(CLIP, {"hidden_size": 8})
