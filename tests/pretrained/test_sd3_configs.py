"""Configurations and tensor names of Stable Diffusion 3's transformer and T5, released sizes by shape only."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.t5 import T5Config, T5Encoder
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.image_models import MMDIT, T5
from sysdpo_jax.pretrained.names import tensors_of
from sysdpo_jax.pretrained.params import load_params, stored_tensors
from sysdpo_jax.pretrained.tensors import Safetensors, write_safetensors
from tests.parity.convert_diffusion import randomise

# The transformer/config.json of the three releases.
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "_diffusers_version": "0.31.0.dev0",
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "_diffusers_version": "0.31.0.dev0",
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
RELEASES = {"sd3 medium": SD3_MEDIUM, "sd3.5 medium": SD35_MEDIUM, "sd3.5 large": SD35_LARGE}
# text_encoder_3/config.json of all three: the encoder of T5 v1.1 XXL.
T5_XXL = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}
TINY = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 9,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
TINY_T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}


def reader(values):
    return ConfigReader(values, "transformer/config.json")


def abstract_mmdit(c):
    inputs = ((1, 4, 4, c.in_channels), (1,), (1, 3, c.joint_attention_dim), (1, c.pooled_projection_dim))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return jax.eval_shape(MMDiT(c).init, jax.random.key(0), *args)["params"]


def abstract_t5(c):
    return jax.eval_shape(T5Encoder(c).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 3), jnp.int32))["params"]


def stored_shapes(abstract, naming):
    found = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        for tensor in tensors_of("/".join(key.key for key in path), leaf.shape, naming):
            found[tensor.name] = tensor.shape(leaf.shape)
    return found


def size(abstract):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def parameter_shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def released(values):
    """diffusers' model of a config.json, without storage."""
    with torch.device("meta"):
        return diffusers.SD3Transformer2DModel.from_config(values)


@pytest.mark.parametrize(("name", "billions"), [("sd3 medium", 2.03), ("sd3.5 medium", 2.24), ("sd3.5 large", 8.06)])
def test_the_released_transformers_have_diffusers_tensors(name, billions):
    config = MMDIT.read(reader(RELEASES[name]))
    model = released(RELEASES[name])
    abstract = abstract_mmdit(config)
    naming = MMDIT.naming(MMDiTConfig(**TINY))
    table = abstract["pos_embed"]["pos_embed"]
    assert stored_shapes(abstract, naming) == parameter_shapes(model) | {"pos_embed.pos_embed": table.shape}
    assert table.shape == model.pos_embed.pos_embed.shape
    learned = size(abstract) - table.size
    assert learned == sum(p.numel() for p in model.parameters())
    assert learned == pytest.approx(billions * 1e9, rel=0.01)


def test_the_released_t5_has_transformers_tensors():
    config = T5.read(reader(T5_XXL))
    assert config == T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
    abstract = abstract_t5(config)
    assert stored_shapes(abstract, T5.naming(config)) == parameter_shapes(model)
    assert size(abstract) == sum(p.numel() for p in model.parameters())
    assert size(abstract) == pytest.approx(4.76e9, rel=0.01)


@pytest.mark.parametrize("name", RELEASES)
def test_transformer_configurations_survive_writing_and_diffusers_reads_them(name):
    config = MMDIT.read(reader(RELEASES[name]))
    written = json.loads(json.dumps(MMDIT.write(config)))
    assert MMDIT.read(reader(written)) == config
    theirs, wanted = released(written).config, released(RELEASES[name]).config
    for field in written.keys() - {"_class_name"}:
        assert theirs[field] == written[field] == json.loads(json.dumps(wanted[field])), field


def test_t5_configurations_survive_writing_and_transformers_reads_them():
    config = T5Config(**TINY_T5, relative_attention_num_buckets=8, layer_norm_epsilon=1e-5)
    written = json.loads(json.dumps(T5.write(config)))
    assert T5.read(reader(written)) == config
    theirs = transformers.T5Config.from_dict(written)
    assert (theirs.dense_act_fn, theirs.is_gated_act, theirs.is_decoder) == ("gelu_new", True, False)
    assert T5.read(reader(json.loads(theirs.to_json_string()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, "unknown qk_norm 'layer_norm'"),
        ({"patch_size": 4}, "patch_size must be 1 or 2"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=None is not supported"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel' is not supported"),
        ({"use_rotary": True}, "use_rotary=True"),
    ],
)
def test_other_transformers_are_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=f"transformer/config.json.*{message}"):
        MMDIT.read(reader(SD3_MEDIUM | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        ({"model_type": "umt5"}, "model_type='umt5'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"relative_attention_num_buckets": 6}, "must be a multiple of 4"),
        ({"use_relative_bias": 3}, "use_relative_bias=3"),
    ],
)
def test_other_t5s_are_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=f"transformer/config.json.*{message}"):
        T5.read(reader(T5_XXL | change))
    missing = {key: value for key, value in T5_XXL.items() if key != "feed_forward_proj"}
    with pytest.raises(CheckpointError, match="no 'feed_forward_proj'"):
        T5.read(reader(missing))


def saved_mmdit(folder, table, dtype=torch.float32):
    model = diffusers.SD3Transformer2DModel(**TINY)
    randomise(model, 0)
    model.to(dtype)
    model.pos_embed.pos_embed = table
    model.save_pretrained(folder)
    config = MMDIT.read(reader(json.loads((folder / "config.json").read_text())))
    return model, config, Safetensors(folder, "diffusion_pytorch_model")


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_a_transformer_of_diffusers_comes_back_bit_for_bit_with_any_table_of_positions(tmp_path, dtype, table_dtype):
    """Each tensor in its own precision."""
    table = torch.randn(1, 81, 16, generator=torch.Generator().manual_seed(1)).to(table_dtype)
    model, config, source = saved_mmdit(tmp_path / "theirs", table, dtype)
    params = load_params(abstract_mmdit(config), source, MMDIT.naming(config))
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MMDIT.write(config)))
    write_safetensors(folder, "diffusion_pytorch_model", stored_tensors(params, MMDIT.naming(config)))
    before, after = (load_file(x / "diffusion_pytorch_model.safetensors") for x in (tmp_path / "theirs", folder))
    assert before.keys() == after.keys()
    assert torch.equal(after["pos_embed.pos_embed"], table)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    back, report = diffusers.SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert torch.equal(back.pos_embed.pos_embed, table.to(dtype))


def test_a_table_of_positions_must_be_there_and_of_the_size_that_the_configuration_says(tmp_path):
    _, _, source = saved_mmdit(tmp_path, torch.zeros(1, 81, 16))
    smaller = MMDiTConfig(**TINY | {"pos_embed_max_size": 8})
    message = r"misshapen: pos_embed\.pos_embed: the configuration says \[1, 64, 16\], the file \[1, 81, 16\]"
    with pytest.raises(CheckpointError, match=message):
        load_params(abstract_mmdit(smaller), source, MMDIT.naming(smaller))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["pos_embed.pos_embed"]
    save_file(tensors, file)
    config, source = MMDiTConfig(**TINY), Safetensors(tmp_path, "diffusion_pytorch_model")
    with pytest.raises(CheckpointError, match=r"missing: pos_embed\.pos_embed \[1, 81, 16\]"):
        load_params(abstract_mmdit(config), source, MMDIT.naming(config))


@pytest.mark.parametrize("kept", ["shared", "both", "embed_tokens"])
def test_a_t5_comes_back_however_its_embedding_was_stored(tmp_path, kept):
    model = transformers.T5EncoderModel(transformers.T5Config(**TINY_T5, feed_forward_proj="gated-gelu"))
    randomise(model, 0)
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    # What transformers writes; older files hold the second name too or instead.
    assert "encoder.embed_tokens.weight" not in tensors
    if kept != "shared":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    if kept == "embed_tokens":
        del tensors["shared.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    config = T5.read(reader(json.loads((tmp_path / "theirs" / "config.json").read_text())))
    params = load_params(abstract_t5(config), Safetensors(tmp_path / "theirs", "model"), T5.naming(config))
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(T5.write(config)))
    write_safetensors(folder, "model", stored_tensors(params, T5.naming(config)))
    back, report = transformers.T5EncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_the_encoder_of_a_whole_t5_is_read(tmp_path):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY_T5, feed_forward_proj="gated-gelu"))
    model.save_pretrained(tmp_path)
    config = T5.read(reader(json.loads((tmp_path / "config.json").read_text())))
    params = load_params(abstract_t5(config), Safetensors(tmp_path, "model"), T5.naming(config))
    expected = model.encoder.block[1].layer[1].DenseReluDense.wi_0.weight.detach().numpy().T
    np.testing.assert_array_equal(params["encoder"]["block_1"]["layer_1"]["DenseReluDense"]["wi_0"]["kernel"], expected)
