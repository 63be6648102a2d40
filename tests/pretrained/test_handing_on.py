"""What was read and is not trained goes out again unchanged, and what was changed after loading does not."""

import dataclasses
import json
import shutil

import jax
import pytest
import torch
import transformers

from sysdpo_jax import pretrained
from sysdpo_jax.components.source import Source
from sysdpo_jax.pretrained.handing_on import handed_on
from tests.components.stubs import CHAT_TEMPLATE, byte_tokenizer, word_tokenizer
from tests.pretrained.checkpoints import write_decoder

# Of other programs: nothing of it is read here.
EXTRA = {"use_cache": False, "_name_or_path": "someone/model", "rope_theta": 5000.0, "initializer_range": 0.3}
GENERATION = {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "_from_model_config": True}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<eos>", "<unk>"],
    "model_max_length": 64,
    "a_key_of_someone": [1, 2],
}


def write_json(path, values):
    # Laid out in another way than the library does, so that a copy shows.
    path.write_text(json.dumps(values, indent=7))


def decoder_folder(folder):
    """A Llama as older programs leave it, with files and keys that nobody here reads."""
    write_decoder(folder, "llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    write_json(folder / "config.json", config | EXTRA | {"torch_dtype": "float32", "auto_map": {"AutoModel": "x.Y"}})
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", {"eos_token": "<eos>"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "vocab.json").write_text("{}")
    (folder / "training_args.json").write_text("{}")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def test_a_decoders_files_go_out_as_they_came_though_the_folder_is_gone(tmp_path):
    folder = decoder_folder(tmp_path / "in")
    kept = {name: (folder / name).read_bytes() for name in (*TOKENIZER_FILES, "vocab.json")}
    config = json.loads((folder / "config.json").read_text())
    component, params = pretrained.load(folder)
    # Running texts through a tokenizer leaves its padding and truncation behind; that is no change.
    component.tokenizer(["a red", "ball"], padding="max_length", truncation=True, max_length=5)
    shutil.rmtree(folder)
    pretrained.save(tmp_path / "out", component, params)
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in kept} == kept
    written = json.loads((out / "config.json").read_text())
    assert {name: written[name] for name in config if name != "auto_map"} == {
        name: value for name, value in config.items() if name != "auto_map"
    }
    # The code that it names does not go along, and nobody needs it.
    assert "auto_map" not in written
    generation = json.loads((out / "generation_config.json").read_text())
    assert {name: generation[name] for name in GENERATION} == GENERATION
    assert names(out) == {*kept, "config.json", "generation_config.json", "model.safetensors"}


def test_files_are_no_part_of_what_a_component_is(tmp_path):
    component, _ = pretrained.load(decoder_folder(tmp_path / "in"))
    other = dataclasses.replace(component, source=None)
    assert isinstance(component.source, Source)
    assert component == other
    assert hash(component) == hash(other)
    assert "source" not in repr(component)


def test_a_configuration_that_was_changed_after_loading_is_written_anew(tmp_path):
    component, params = pretrained.load(decoder_folder(tmp_path / "in"))
    longer = dataclasses.replace(component.decoder.config, rope_theta=70000.0)
    changed = dataclasses.replace(component, decoder=type(component.decoder)(longer), stop_tokens=(6,))
    pretrained.save(tmp_path / "out", changed, params)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert again.rope_parameters["rope_theta"] == 70000.0
    # Other ends than the files name, in both files that name them; the sampling settings are still the file's.
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert again.eos_token_id == generation["eos_token_id"] == [2, 6]
    assert generation["temperature"] == 0.6


def test_the_file_of_transformers_5_is_completed_for_older_readers(tmp_path):
    """They look for rope_theta by itself, and take 10000 where it is inside rope_parameters."""
    write_decoder(tmp_path / "in", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert "rope_theta" not in json.loads((tmp_path / "in" / "config.json").read_text())
    component, params = pretrained.load(tmp_path / "in")
    pretrained.save(tmp_path / "out", component, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0


def test_what_the_writer_says_is_not_handed_on():
    """As of a whole T5, of which a pipeline's encoder is one half."""
    values = {"architectures": ["Whole"], "auto_map": {"A": "b.C"}, "size": 1, "unread": 2}
    written = {"architectures": ["Half"], "size": 1, "eps": 0.5}
    read = {"size": 1, "eps": 0.5}.items()
    assert handed_on(values, written, True, lambda joined: read <= joined.items()) == {**written, "unread": 2}
    assert handed_on({**values, "size": 3}, written, True, lambda joined: read <= joined.items()) == written


def with_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eos>", "<unk>", "<new>"]})


def with_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize("change", [with_token, with_template])
def test_a_changed_tokenizer_is_written_anew_in_words_that_every_version_reads(change, tmp_path):
    component, params = pretrained.load(decoder_folder(tmp_path / "in"))
    change(component.tokenizer)
    pretrained.save(tmp_path / "out", component, params)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert not {"special_tokens_map.json", "vocab.json"} & names(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for read in (again, pretrained.load(tmp_path / "out")[0].tokenizer):
        assert read.get_vocab() == component.tokenizer.get_vocab()
        assert read.special_tokens_map == component.tokenizer.special_tokens_map
        assert read.chat_template == component.tokenizer.chat_template


def test_another_tokenizer_than_the_folders_is_written_and_gives_its_ids(tmp_path):
    folder = decoder_folder(tmp_path / "in")
    other = word_tokenizer(bos=True, chat=True)
    other.eos_token = "<unk>"
    component, params = pretrained.load(folder, tokenizer=other)
    pretrained.save(tmp_path / "out", component, params)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a red")["input_ids"] == other("a red")["input_ids"] == [1, 4, 5]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [3, 2, 5]
    # The folder's own, passed by hand, is the folder's own.
    same, params = pretrained.load(folder, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))
    pretrained.save(tmp_path / "same", same, params)
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


def test_a_folder_of_transformers_5_is_put_into_words_that_every_version_reads(tmp_path):
    write_decoder(tmp_path / "in", "llama", vocab_size=300)
    tokenizer = byte_tokenizer("r e", "re d")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path / "in")
    made = json.loads((tmp_path / "in" / "tokenizer_config.json").read_text())
    assert (made["tokenizer_class"], made["extra_special_tokens"]) == ("TokenizersBackend", ["<|user|>"])
    component, params = pretrained.load(tmp_path / "in")
    pretrained.save(tmp_path / "out", component, params)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|user|>"]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("red<|user|>")["input_ids"] == tokenizer("red<|user|>")["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize(("stored", "written"), [(0, 0), (14, None)])
def test_a_padding_token_beyond_the_vocabulary_stays_with_the_tokenizer(stored, written, tmp_path):
    """As in fine-tuned Llamas with an added [PAD]; torch makes no embedding with such a padding row."""
    write_decoder(tmp_path / "in", "llama")
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    write_json(tmp_path / "in" / "config.json", config | {"pad_token_id": stored})
    component, params = pretrained.load(tmp_path / "in")
    assert component.tokenizer.pad_token_id == component.decoder.config.vocab_size == 14
    assert component.prepare(["ball"], {"x": ["a red"]})["tokens"].max() < 14
    pretrained.save(tmp_path / "out", component, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.pad_token_id == written
    assert pretrained.load(tmp_path / "out")[0].tokenizer.pad_token == "[PAD]"


def test_what_was_trained_is_what_is_written(tmp_path):
    """Files are handed on, weights never."""
    component, params = pretrained.load(decoder_folder(tmp_path / "in"))
    pretrained.save(tmp_path / "out", component, jax.tree.map(lambda leaf: 2 * leaf, params))
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("in", "out")
    )
    assert all(torch.equal(2 * theirs[name], ours[name]) for name in theirs)


def test_the_stated_precision_rounds_no_leaf(tmp_path):
    """transformers casts all weights to what config.json says: the widest of what is stored."""
    write_decoder(tmp_path / "in", "llama", torch.bfloat16)
    component, params = pretrained.load(tmp_path / "in", tokenizer=word_tokenizer())
    params["layers"] = jax.tree.map(lambda leaf: leaf.astype("float32") + 1e-6, params["layers"])
    pretrained.save(tmp_path / "out", component, params)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["dtype"], stated["torch_dtype"]) == ("float32", "float32")
