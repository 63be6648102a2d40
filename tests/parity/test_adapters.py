"""Adapters trained here and loaded by PEFT and diffusers: the PyTorch models then compute what ours do.

1e-4 in float32: two implementations that order their sums differently, outputs of order 1 to 10.
"""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sysdpo_jax import (
    CompoundSystem,
    Diffusion,
    DirectObjective,
    FrozenText,
    Gaussian,
    LanguageModel,
    Node,
    PairBatch,
    PixelCodec,
    TextEncoder,
    encode_batch,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.lora import TRAINABLE, LoRA, add_lora, merge_lora
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from sysdpo_jax.pretrained import load, save_adapter
from sysdpo_jax.pretrained.adapters import write_diffusers_adapter, write_peft_adapter
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.image_models import PARTS
from sysdpo_jax.pretrained.language import decoder_naming
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import stored_tensors
from sysdpo_jax.training import ComponentOptimizer, create_state, make_optimizer, make_train_step
from tests.components.stubs import SPECIAL, WORDS, Embedding, word_tokenizer
from tests.parity.convert import llama_params
from tests.parity.convert_diffusion import randomise, torch_params
from tests.parity.convert_sd3 import torch_params as sd3_params
from tests.pretrained.checkpoints import stable_diffusion_1, write_decoder

KEY = jax.random.key(0)
TOLERANCE = 1e-4
VOCABULARY = len(SPECIAL) + len(WORDS)
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
}
UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 4,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
MMDIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}


def texts(rng, rows):
    return [" ".join(rng.choice(WORDS, 5)) for _ in range(rows)]


def trained(component, params, value):
    """The parameters after two steps of Adam on random preferences. value(rng) makes one raw value."""
    system = CompoundSystem(("x",), (Node("y", component, ("x",)),))
    rng = np.random.default_rng(0)
    sides = [system.prepare([{"x": x, "y": value(rng)} for x in texts(rng, 4)]) for _ in range(2)]
    optimizer = make_optimizer({"y": ComponentOptimizer(optax.adam(0.05), trainable=TRAINABLE)})
    state = create_state(system, {"y": params}, optimizer)
    step = make_train_step(system, DirectObjective(0.1), optimizer)
    batch = encode_batch(system, {"y": params}, PairBatch(*sides))
    for _ in range(2):
        state, metrics = step(state, batch, KEY)
        assert metrics["finite"]
    return state.params["y"]


def randomised(params):
    """Every lora_b off zero."""
    flat = flatten_dict(params, sep="/")
    for number, path in enumerate(sorted(flat)):
        if path.endswith("lora_b"):
            drawn = np.random.default_rng(number).normal(size=flat[path].shape)
            flat[path] = jax.device_put((0.2 * drawn).astype(flat[path].dtype))
    return unflatten_dict(flat, sep="/")


def language_model(tie):
    """A torch Llama, our component and its parameters, with factors of two ranks trained for two steps."""
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, tie_word_embeddings=tie, initializer_range=0.25, eos_token_id=None, bos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    component = LanguageModel(Decoder(DecoderConfig(**LLAMA, tie_word_embeddings=tie)), word_tokenizer(), 8, 8)
    params = add_lora(llama_params(model), LoRA(4, 6.0, "attention"), jax.random.key(1))
    params = add_lora(params, LoRA(2, 5.0, ("mlp",) if tie else ("mlp", "lm_head")), jax.random.key(2))
    return model, component, trained(component, params, lambda rng: texts(rng, 1)[0])


# peft 0.21 asks transformers for a name that version 5 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("tie", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peft_loads_a_language_models_adapter(tie, tmp_path):
    # Takes seconds to import.
    from peft import PeftModel

    model, component, params = language_model(tie)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 9))
    found = jax.jit(component.decoder.apply)({"params": params}, jnp.array(tokens))
    with torch.no_grad():
        base = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(found - base).max() > 0.1

    save_adapter(tmp_path / "adapter", component, params, "some/base")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 6
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{first}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{first}.lora_B.weight"].shape == (32, 4)
    # Those of rank 2 too: readers that know one rank and one alpha compute the same.
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name} == {4}

    merged = LlamaForCausalLM(model.config).eval()
    stored = {
        name: torch.tensor(array) for name, array in stored_tensors(params, decoder_naming(component.decoder.config))
    }
    merged.load_state_dict(stored, strict=not tie)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    names = {name.rpartition(".lora_A.")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert names == {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    for theirs in (merged, adapted):
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_diffusers_loads_a_unets_adapter(tmp_path):
    """Its proj_in and proj_out are 1 x 1 convolutions there, as in Stable Diffusion 1."""
    model = diffusers.UNet2DConditionModel(sample_size=8, **UNET).eval()
    randomise(model, 1)
    denoiser = UNet2DCondition(UNetConfig(**UNET))
    text = TextEncoder(Embedding(), word_tokenizer(), 5)
    component = Diffusion(denoiser=denoiser, text=FrozenText(text), codec=PixelCodec((8, 8, 3)))
    params = {"denoiser": torch_params(model), "text": text.init(KEY)}
    params = add_lora(params, LoRA(4, 6.0, ("attention", "proj_(in|out)$")), jax.random.key(1))
    params = add_lora(params, LoRA(2, 5.0, ("mlp", "time_emb")), jax.random.key(2))
    params = trained(component, params, lambda rng: rng.uniform(size=(8, 8, 3)).astype(np.float32))

    save_adapter(tmp_path / "adapter", component, params)
    rng = np.random.default_rng(2)
    image, time = rng.standard_normal((2, 8, 8, 3)).astype(np.float32), np.array([10, 800])
    text = rng.standard_normal((2, 5, 4)).astype(np.float32)
    found = jax.jit(denoiser.apply)({"params": params["denoiser"]}, image, time, text)
    merged = diffusers.UNet2DConditionModel(sample_size=8, **UNET).eval()
    naming = PARTS["unet"].naming(denoiser.config)
    merged.load_state_dict({name: torch.tensor(x) for name, x in stored_tensors(params["denoiser"], naming)})

    def run(theirs):
        args = (torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(time), torch.tensor(text))
        with torch.no_grad():
            return theirs(*args).sample.numpy().transpose(0, 2, 3, 1)

    assert np.abs(found - run(model)).max() > 0.05
    diffusers.StableDiffusionPipeline.load_lora_into_unet(
        *diffusers.StableDiffusionPipeline.lora_state_dict(tmp_path / "adapter"), model
    )
    for theirs in (merged, model):
        np.testing.assert_allclose(found, run(theirs), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_diffusers_loads_a_transformers_adapter(tmp_path):
    model = diffusers.SD3Transformer2DModel(**MMDIT).eval()
    randomise(model, 1)
    module = MMDiT(MMDiTConfig(**MMDIT))
    params = add_lora(sd3_params(model), LoRA(4, 6.0, ("all_linear",)), jax.random.key(1))
    params = randomised(params)
    write_diffusers_adapter(tmp_path / "adapter", params, PARTS["transformer"].naming(module.config), "transformer")
    rng = np.random.default_rng(2)
    image, time = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), np.array([10, 800])
    text, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 12), (2, 10)))
    found = jax.jit(module.apply)({"params": params}, image, time, text, pooled)

    def run():
        with torch.no_grad():
            inputs = (torch.tensor(x) for x in (image.transpose(0, 3, 1, 2), text, pooled, time))
            return model(*inputs).sample.numpy().transpose(0, 2, 3, 1)

    assert np.abs(found - run()).max() > 0.1
    model.load_lora_adapter(tmp_path / "adapter", prefix="transformer", use_safetensors=True)
    np.testing.assert_allclose(found, run(), rtol=0, atol=TOLERANCE)


def mixed(seed=0):
    """Two dense layers with factors of other ranks and scales, the first of the smaller rank."""
    rng = np.random.default_rng(seed)
    params = {name: {"kernel": rng.standard_normal((6, 8)).astype(np.float32)} for name in ("first", "second", "third")}
    params = add_lora(params, LoRA(2, 5.0, "first"), jax.random.key(1))
    return randomised(add_lora(params, LoRA(4, 6.0, ("second", "third")), jax.random.key(2)))


def products(tensors, prefix, scale):
    """`{layer: scale(rank) A B}` of the factors in a file, in our layout."""
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    pairs = {module: (tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]) for module in modules}
    return {module.removeprefix(prefix): scale(len(a)) * (b @ a).T for module, (a, b) in pairs.items()}


def test_layers_of_different_ranks_are_scaled_alike_by_readers_old_and_new(tmp_path):
    """The product of each layer, by the rules of the readers; 1e-6 is float32 rounding of values of order 1."""
    params = mixed()
    expected = {name: merge_lora(params)[name]["kernel"] - params[name]["kernel"] for name in params}
    write_diffusers_adapter(tmp_path / "diffusers", params, Naming(), "unet")
    tensors = load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    # diffusers refuses a file with any other key ("Invalid LoRA checkpoint").
    assert all("lora" in name for name in tensors)
    first = len(next(tensor for name, tensor in tensors.items() if name.endswith("lora_A.weight")))
    # Today alpha is each layer's rank; until 0.35 at least that of the first one for all.
    for alpha in (lambda rank: rank, lambda rank: first):
        found = products(tensors, "unet.", lambda rank, alpha=alpha: alpha(rank) / rank)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)
    write_peft_adapter(tmp_path / "peft", params, Naming(), None, {})
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = products(tensors, "base_model.model.", lambda rank: config["lora_alpha"] / config["r"])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)
    # The layers that have the rank and the scale already are stored as they were trained.
    np.testing.assert_array_equal(tensors["base_model.model.second.lora_B.weight"].T, params["second"]["lora_b"])


def loaded(folder, tie=False):
    """A decoder from files, with factors that change what it computes."""
    write_decoder(folder, "llama", tie_word_embeddings=tie)
    component, params = load(folder)
    return component, randomised(add_lora(params, LoRA(4, 6.0, "attention"), jax.random.key(1)))


def scaled(params, path):
    """The parameters with one leaf trained beside the factors."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({**flat, path: 1.5 * flat[path]}, sep="/")


# peft 0.21 asks transformers for a name that version 5 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_embedding_and_head_that_were_trained_beside_the_factors_are_in_the_adapter(tmp_path):
    from peft import PeftModel

    component, params = loaded(tmp_path / "base")
    params = scaled(scaled(params, "embed_tokens/embedding"), "lm_head/kernel")
    save_adapter(tmp_path / "adapter", component, params)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "adapter")(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(component.decoder.apply)({"params": params}, jnp.array(tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_what_else_was_trained_is_refused_by_name(tmp_path):
    component, params = loaded(tmp_path / "base")
    message = r"no place for .*: model\.norm\.weight differ from .*base\. Write the whole model with save"
    with pytest.raises(CheckpointError, match=message):
        save_adapter(tmp_path / "adapter", component, scaled(params, "norm/weight"))
    # A layer with factors whose kernel was trained too.
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight, .* and 1 more differ"):
        save_adapter(tmp_path / "adapter", component, scaled(params, "layers/self_attn/q_proj/kernel"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"base, which the model was loaded from, is gone"):
        save_adapter(tmp_path / "adapter", component, params)
    # A tied head would not follow the embedding that PEFT keeps.
    component, params = loaded(tmp_path / "tied", tie=True)
    with pytest.raises(CheckpointError, match=r"no place for .*: model\.embed_tokens\.weight"):
        save_adapter(tmp_path / "adapter", component, scaled(params, "embed_tokens/embedding"))
    assert not (tmp_path / "adapter").exists()


def test_factors_in_another_precision_than_the_files_are_no_training(tmp_path):
    """The base as bfloat16: it is compared as it was loaded."""
    write_decoder(tmp_path / "base", "llama")
    component, params = load(tmp_path / "base", param_dtype="bfloat16")
    save_adapter(tmp_path / "adapter", component, add_lora(params, LoRA(4, 6.0), jax.random.key(1)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_a_denoiser_that_was_trained_beside_its_factors_is_refused(tmp_path):
    torch.manual_seed(0)
    stable_diffusion_1().save_pretrained(tmp_path / "base")
    component, params = load(tmp_path / "base")
    params = randomised(add_lora(params, LoRA(2, 4.0, "to_q"), jax.random.key(1)))
    save_adapter(tmp_path / "adapter", component, params)
    with pytest.raises(CheckpointError, match=r"no place for .*: conv_in\.bias differ from .*base"):
        save_adapter(tmp_path / "other", component, scaled(params, "denoiser/conv_in/bias"))


def test_of_a_component_that_was_not_loaded_only_the_factors_are_known(tmp_path, caplog):
    component = LanguageModel(Decoder(DecoderConfig(**LLAMA)), word_tokenizer(), 8, 8)
    save_adapter(tmp_path / "adapter", component, add_lora(zeros(component), LoRA(2, 2.0), KEY))
    assert "only its LoRA factors are written" in caplog.text


def zeros(component):
    """A component's parameters without drawing them, which would compile every layer."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(component.init, KEY))


def test_what_cannot_be_written_is_refused(tmp_path):
    component = LanguageModel(Decoder(DecoderConfig(**LLAMA)), word_tokenizer(), 8, 8)
    with pytest.raises(CheckpointError, match="carry no LoRA"):
        save_adapter(tmp_path / "adapter", component, zeros(component))
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(CheckpointError, match="a Gaussian has no Hugging Face form"):
        save_adapter(tmp_path / "adapter", Gaussian(2, 3), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_adapter(tmp_path, component, zeros(component))
    image = Diffusion(
        denoiser=UNet2DCondition(UNetConfig(**UNET)),
        text=TextEncoder(Embedding(), word_tokenizer(), 5),
        codec=PixelCodec((8, 8, 3)),
    )
    with pytest.raises(CheckpointError, match="not those of text"):
        save_adapter(tmp_path / "adapter", image, zeros(image))
