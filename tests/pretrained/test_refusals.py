"""What is no checkpoint by itself is refused with the way to one; weights in several layouts of files."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sysdpo_jax import pretrained
from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.pretrained.refusals import PART_CLASSES, SINGLE_FILES
from tests.components.stubs import word_tokenizer
from tests.pretrained.checkpoints import unet, write_decoder

TOKENS = np.array([[3, 4, 5, 6]])


def refusal(path, **settings):
    with pytest.raises(CheckpointError) as caught:
        pretrained.load(path, **settings)
    return str(caught.value)


def logits(folder):
    component, params = pretrained.load(folder)
    return np.asarray(component.decoder.apply({"params": params}, jnp.asarray(TOKENS)))


def write_adapted(folder):
    """A model and, beside it, an adapter that changes what it computes; returns transformers' logits with it."""
    model = write_decoder(folder, "llama")
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_beside_a_whole_model_is_refused_and_both_ways_on_lead_to_what_was_meant(tmp_path):
    """Moved away, the model computes what it does alone; merged, what transformers computes for the folder: 1e-4."""
    adapted = write_adapted(tmp_path / "model")
    message = refusal(tmp_path / "model")
    assert "an adapter beside the model (adapter_config.json, adapter_model.safetensors)" in message
    assert "merge_and_unload().save_pretrained(new_folder)" in message
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(tmp_path / "model" / name, tmp_path / "adapter" / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        alone = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(adapted - alone).max() > 0.01
    np.testing.assert_allclose(logits(tmp_path / "model"), alone, rtol=0, atol=1e-4)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    word_tokenizer().save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(tmp_path / "merged"), adapted, rtol=0, atol=1e-4)


def test_an_adapter_alone_names_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    assert "holds an adapter of 'someone/base': load its base model" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "holds an adapter: load its base model" in refusal(tmp_path)
    assert "holds an adapter" in refusal(tmp_path / "pytorch_lora_weights.safetensors")


def test_factors_within_the_weights_are_an_adapter_too(tmp_path):
    """As peft's wrapped models are saved by hand."""
    write_decoder(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}, file)
    assert "hold the factors of an adapter beside the kernels" in refusal(tmp_path)


@pytest.mark.parametrize("kind", PART_CLASSES)
def test_a_part_alone_says_how_to_give_it(kind, tmp_path):
    """By the class that its config.json names, whichever library wrote it."""
    key = "architectures" if "Encoder" in kind or "CLIP" in kind else "_class_name"
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({key: [kind] if key == "architectures" else kind}))
    message = refusal(folder)
    assert f"holds {kind} alone" in message
    assert f"load('path/to/pipeline', parts={{{PART_CLASSES[kind]!r}: {str(folder)!r}}})" in message


def test_a_checkpoint_of_training_with_the_unet_alone_says_how_to_give_it(tmp_path):
    unet().save_config(tmp_path / "unet")
    assert f"parts={{'unet': '{tmp_path / 'unet'}'}}" in refusal(tmp_path)
    assert f"parts={{'unet': '{tmp_path / 'unet'}'}}" in refusal(tmp_path / "unet")
    diffusers.DDIMScheduler().save_config(tmp_path / "scheduler")
    assert f"parts={{'scheduler': '{tmp_path / 'scheduler'}'}}" in refusal(tmp_path / "scheduler")
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert "FluxTransformer2DModel, a model of diffusers that is not known" in refusal(tmp_path / "unet")


@pytest.mark.parametrize(("start", "pipeline"), SINGLE_FILES)
def test_a_single_file_says_how_to_convert_it(start, pipeline, tmp_path):
    """Given itself, or the folder that it lies in. The remedy names what diffusers has."""
    file = tmp_path / "someones_model.safetensors"
    save_file({f"{start}0.weight": torch.zeros(1), "model.diffusion_model.out.0.bias": torch.zeros(1)}, file)
    for given in (file, tmp_path):
        assert f"diffusers.{pipeline}.from_single_file({str(file)!r}).save_pretrained(new_folder)" in refusal(given)
    assert callable(getattr(diffusers, pipeline).from_single_file)


def test_other_files_say_what_to_give(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file({"decoder.up.0.block.0.conv1.weight": torch.zeros(1)}, file)
    assert "diffusers.AutoencoderKL.from_single_file(" in refusal(file)
    file.write_bytes(b"no safetensors")
    assert "is damaged" in refusal(file)
    for name in ("model.ckpt", "pytorch_model.bin", "weights.pt"):
        (tmp_path / "pickles").mkdir(exist_ok=True)
        (tmp_path / "pickles" / name).write_bytes(b"x")
        assert "is a pickle file, which can run code and is never read" in refusal(tmp_path / "pickles" / name)
    assert "holds model.ckpt, pytorch_model.bin, weights.pt and no config.json" in refusal(tmp_path / "pickles")


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_a_variant_is_found_whole_and_in_shards_and_must_be_asked_for(shard_size, tmp_path):
    """The names that today's transformers writes; where the plain weights lie beside, they are the default."""
    model = write_decoder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.fp16.json").exists() == (shard_size == "20KB")
    assert refusal(tmp_path).endswith(": pass variant='fp16'")
    _, params = pretrained.load(tmp_path, variant="fp16")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    index = tmp_path / "model.safetensors.index.fp16.json"
    if index.exists():
        # The name that older versions of diffusers gave it.
        index.rename(tmp_path / "model.safetensors.fp16.index.json")
        assert refusal(tmp_path).endswith(": pass variant='fp16'")
        pretrained.load(tmp_path, variant="fp16")
    model.float().save_pretrained(tmp_path)
    _, plain = pretrained.load(tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(plain)} == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), params, plain)


def test_weights_that_are_there_twice_are_refused(tmp_path):
    """transformers would read the one file, diffusers the shards."""
    write_decoder(tmp_path, "llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, tmp_path)
    assert "holds the weights twice, as model.safetensors and as the shards of" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    pretrained.load(tmp_path)


def test_a_precision_that_is_none_of_a_parameter_is_named_before_the_shapes(tmp_path):
    write_decoder(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}, file)
    assert f"tensor '{name}' is stored as F8_E4M3, which is not supported" in refusal(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    write_decoder(tmp_path, "llama", vocab_size=8)
    assert "tokens beyond the model's vocab_size=8" in refusal(tmp_path)
    # One that is passed is its giver's business: rows that use such tokens are refused one by one.
    pretrained.load(tmp_path, tokenizer=word_tokenizer())


def test_settings_from_json_have_lists(tmp_path):
    write_decoder(tmp_path, "llama")
    component, _ = pretrained.load(tmp_path, stop_tokens=[5, 6])
    assert component.stop_tokens == (5, 6)
    hash(component)


def test_a_whole_language_model_may_lie_in_a_pipelines_folder(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    write_decoder(tmp_path / "llm", "llama")
    assert pretrained.load(tmp_path / "llm", tokenizer=word_tokenizer())[0].decoder.config.model_type == "llama"
