"""Decoder checkpoints of transformers as LanguageModel components and back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sysdpo_jax as sj
from sysdpo_jax import pretrained
from sysdpo_jax.pretrained import CheckpointError
from tests.components.painters import arrays_in
from tests.components.stubs import word_tokenizer
from tests.models.programs import compiling
from tests.pretrained.checkpoints import FAMILIES, write_decoder

TEXTS = (["a red", "the small cube on"], ["ball on the left", "a large green ball"])


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_transformers(family, tmp_path):
    """Completion and end of sequence, each row alone on their side. 1e-4: float32 sums of at most 6 tokens."""
    model = write_decoder(tmp_path, family)
    # AutoTokenizer rebuilds every tokenizer beside a Qwen2 as Qwen2's own, which a tokenizer of words is not.
    component, params = pretrained.load(tmp_path, tokenizer=word_tokenizer())
    assert isinstance(component, sj.LanguageModel)
    assert component.decoder.config.model_type == family
    assert [*arrays_in(component, family)] == []
    features = component.prepare(TEXTS[1], {"x": TEXTS[0]})
    ours = component.log_prob(params, features, jax.random.key(0))
    tokenizer = word_tokenizer()
    for row, (prompt, answer) in enumerate(zip(*TEXTS, strict=True)):
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], 2]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()
        np.testing.assert_allclose(ours[row], float(expected), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_compiles_nothing(family, tmp_path):
    """No parameter is drawn to be replaced, and nothing of a model runs."""
    write_decoder(tmp_path, family)
    with compiling() as programs:
        pretrained.load(tmp_path, tokenizer=word_tokenizer())
    assert not programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_is_exact_and_silent(family, dtype, tmp_path, library_log):
    """transformers loads what is written without a word, and finds the same bits in the same precision."""
    model = write_decoder(tmp_path / "in", family, dtype)
    component, params = pretrained.load(tmp_path / "in", tokenizer=word_tokenizer())
    pretrained.save(tmp_path / "out", component, params)
    library_log.clear()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert library_log == []
    assert not any(info.values()), info
    assert type(again) is type(model)
    assert again.dtype == dtype
    theirs, ours = model.state_dict(), again.state_dict()
    assert set(theirs) == set(ours)
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(tmp_path / "in" / "model.safetensors")
    )
    # Casting a model in torch rounds its rotary frequencies too, loading does not.
    if dtype == torch.float32:
        tokens = torch.randint(0, 14, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, again(tokens).logits)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer("a red ball")["input_ids"] == word_tokenizer()("a red ball")["input_ids"]
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (2, 0)


def test_what_the_libraries_say_is_seen(tmp_path, library_log):
    """The tests that want silence rely on it; diffusers does not pass its records to the root logger."""
    write_decoder(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.surplus": torch.zeros(2)}, file, {"format": "pt"})
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any("model.surplus" in message for message in library_log)
    library_log.clear()
    diffusers.DDIMScheduler.from_config({"surplus_setting": 1})
    assert any("surplus_setting" in message for message in library_log)


def test_what_load_is_told(tmp_path):
    """Precision of parameters and products, recomputation, lengths, and the further ends of generation_config.json."""
    write_decoder(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    component, params = pretrained.load(
        tmp_path, dtype="bfloat16", param_dtype="float16", remat="full", max_new_tokens=7
    )
    config = component.decoder.config
    assert (config.dtype, config.param_dtype, config.remat) == ("bfloat16", "float16", "full")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float16")}
    assert (component.max_prompt_length, component.max_new_tokens, component.stop_tokens) == (32, 7, (5,))
    with pytest.raises(TypeError, match="max_tokens"):
        pretrained.load(tmp_path, max_tokens=7)


@pytest.mark.parametrize(
    ("generation", "model", "stops"),
    [
        ({"eos_token_id": 5}, [2, 6], (5,)),
        ({"eos_token_id": None}, [2, 6, 7], (6, 7)),
        ({}, 6, (6,)),
        (None, [6, 2], (6,)),
        (None, None, ()),
    ],
)
def test_the_ends_of_the_configuration_stop_where_generation_names_none(generation, model, stops, tmp_path):
    write_decoder(tmp_path, "llama")
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": model}))
    assert pretrained.load(tmp_path)[0].stop_tokens == stops


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_needs_one(family, tmp_path):
    write_decoder(tmp_path, family)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer: fetch the tokenizer's files .* or pass tokenizer="):
        pretrained.load(tmp_path)
    assert pretrained.load(tmp_path, tokenizer=word_tokenizer())[0].tokenizer.eos_token_id == 2
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read .*: fetch the tokenizer's files"):
        pretrained.load(tmp_path)


def test_a_loaded_decoder_trains_and_its_checkpoint_holds_the_result(tmp_path):
    """Two real steps, saved, loaded by transformers: the logits are those of our parameters to 1e-4."""
    write_decoder(tmp_path / "in", "qwen2")
    component, params = pretrained.load(
        tmp_path / "in", tokenizer=word_tokenizer(), max_prompt_length=4, max_new_tokens=6
    )
    system = sj.CompoundSystem(("x",), (sj.Node("answer", component, ("x",), params="lm"),))
    records = [
        sj.PreferenceRecord({"x": prompt}, {"answer": good}, {"answer": bad})
        for prompt, good, bad in zip(*TEXTS, TEXTS[1][::-1], strict=True)
    ]
    optimizer = sj.make_optimizer({"lm": sj.ComponentOptimizer(optax.adam(1e-3))})
    state = sj.create_state(system, {"lm": params}, optimizer)
    step = sj.make_train_step(system, sj.DirectObjective(), optimizer)
    batch = sj.prepare_pairs(system, records)
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[1] < losses[0]
    pretrained.save(tmp_path / "out", component, state.params["lm"])
    tokens = np.random.default_rng(0).integers(0, 14, (2, 9))
    ours = component.decoder.apply({"params": state.params["lm"]}, jnp.array(tokens))
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
        theirs = again(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        CheckpointError, match=r"neither config\.json nor model_index\.json: give a checkpoint's folder"
    ):
        pretrained.load(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter: load its base model"):
        pretrained.load(empty)
    write_decoder(tmp_path / "good", "llama")
    with pytest.raises(CheckpointError, match="is a file: pass the folder that holds it"):
        pretrained.load(tmp_path / "good" / "model.safetensors")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    for change, message in (
        ({"model_type": "mamba"}, "'mamba' is not known"),
        (
            {"residual_multiplier": 0.5},
            r"keys that are not known here and may change the result: residual_multiplier=0\.5",
        ),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"num_hidden_layers": 5}, "8 tensors do not fit|9 tensors do not fit"),
    ):
        (tmp_path / "good" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            pretrained.load(tmp_path / "good")


def test_parameters_that_are_not_the_components_are_refused(tmp_path):
    write_decoder(tmp_path / "in", "llama")
    component, params = pretrained.load(tmp_path / "in")
    fewer = dataclasses.replace(component.decoder.config, num_hidden_layers=3)
    other = jax.eval_shape(lambda: type(component.decoder)(fewer).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    for wrong in ({"lm": params}, other["params"], {"layers": {}}):
        for write in (pretrained.save, pretrained.save_adapter):
            with pytest.raises(
                CheckpointError, match=r"not the component's: \d+ arrays differ.*state\.params\['name'\]"
            ):
                write(tmp_path / "out", component, wrong)
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_before_the_weights_are_read(tmp_path):
    write_decoder(tmp_path, "llama")
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(
        TypeError, match=r"LanguageModel has no setting 'max_new_token' \(did you mean 'max_new_tokens'"
    ):
        pretrained.load(tmp_path, max_new_token=8)
    with pytest.raises(ValueError, match="exceed the decoder's 64 positions"):
        pretrained.load(tmp_path, max_new_tokens=100)
    with pytest.raises(ValueError, match="param_dtype='fp32' is none of bfloat16, float16, float32, float64"):
        pretrained.load(tmp_path, param_dtype="fp32")


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    write_decoder(tmp_path / "in", "llama")
    component, params = pretrained.load(tmp_path / "in")
    with pytest.raises(FileExistsError, match="choose another folder"):
        pretrained.save(tmp_path / "in", component, params)
    with pytest.raises(CheckpointError, match="a Gaussian has no Hugging Face form"):
        pretrained.save(tmp_path / "out", sj.Gaussian(1, 1), {})
    # A Mistral cannot say that its heads have biases.
    broken = component.decoder.config.__class__(
        **{**vars(component.decoder.config), "model_type": "mistral", "qkv_bias": True}
    )
    wrong = sj.LanguageModel(type(component.decoder)(broken), component.tokenizer, 4, 4)
    with pytest.raises(CheckpointError, match="a mistral checkpoint cannot say qkv_bias=True"):
        pretrained.save(tmp_path / "out", wrong, wrong.init(jax.random.key(0)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.slow
def test_a_gigabyte_is_loaded_block_by_block(tmp_path):
    """A random float32 checkpoint of 1 GB, loaded as bfloat16 by a process of its own.

    Its peak memory above what it had before must stay below the 0.5 GB of the result and the largest parameter, read
    (float32) and cast: far from the whole file that a loader of whole models would hold.
    """
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["file"] > 1.0e9
    assert figures["result"] == pytest.approx(figures["file"] / 2, rel=0.01)
    assert figures["peak"] < figures["result"] + 2 * figures["largest"] + 5e7
    assert figures["peak"] < 0.85 * figures["file"]
