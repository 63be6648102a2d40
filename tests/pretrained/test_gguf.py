"""GGUF files written here with the gguf package, against the PyTorch model they were made of and transformers."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.pretrained import load, save
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.decoders import find_family
from sysdpo_jax.pretrained.gguf import read_gguf
from tests.parity.convert import llama_tree

gguf = pytest.importorskip("gguf")
F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<think>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
IDS = np.random.default_rng(0).integers(0, len(TOKENS), (2, 9))
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def llama(tied=False):
    torch.manual_seed(0)
    # Weights five times the default and norms off 1, so that mistakes show.
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.1)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def stored(model):
    """GGUF's names and arrays, as llama.cpp's converter writes them: rotary pairs of queries and keys side by side."""
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        *start, _ = name.removeprefix("model.").split(".")
        if start[0] != "layers":
            yield {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[start[0]], value
            continue
        if start[-1] in ("q_proj", "k_proj"):
            heads = SIZES["num_attention_heads" if start[-1] == "q_proj" else "num_key_value_heads"]
            width = value.shape[0] // heads
            value = value.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(value.shape)
        yield f"blk.{start[1]}.{NAMES['.'.join(start[2:])]}", value


def write(path, model, kind=F32, architecture="llama", settings=(), tensors=(), bos=False, split="smollm", ends=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(SIZES["rope_theta"])
    writer.add_rope_dimension_count(16)
    for name, value in settings:
        writer.add_float32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    for name, token in ends:
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_chat_template(TEMPLATE)
    for name, value in (*stored(model), *tensors):
        written = F32 if value.ndim == 1 else kind
        writer.add_tensor(f"{name}.weight", gguf.quantize(value, written), raw_dtype=written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def our_logits(file):
    config = find_family("llama", "test").read(ConfigReader(file.config, "test"))
    params = llama_tree({name: file.tensors.read(name, ()) for name in file.tensors.shapes})
    return jax.jit(Decoder(config).apply)({"params": params}, IDS)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_file_gives_the_logits_of_the_model_it_was_made_of(tied, tmp_path):
    """1e-4: logits of order 3, products summed in another order."""
    model = llama(tied)
    file = read_gguf(write(tmp_path / "m.gguf", model))
    expected = torch_logits(model)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(file), expected, atol=1e-4)
    written = {name: getattr(model.config, name) for name in SIZES if name != "rope_theta"}
    assert {name: file.config[name] for name in written} == written
    assert file.config["rope_theta"] == SIZES["rope_theta"]
    assert file.config["tie_word_embeddings"] == tied
    assert [file.config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]


@pytest.mark.parametrize("kind", [F16, Q8_0], ids=lambda kind: kind.name)
def test_other_precisions_give_what_transformers_makes_of_them(kind, tmp_path):
    """Their dequantisation is their own. 1e-4 as above; rounding itself moves the logits by more."""
    model = llama()
    file = read_gguf(write(tmp_path / "m.gguf", model, kind))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ours = our_logits(file)
    np.testing.assert_allclose(ours, torch_logits(theirs), atol=1e-4)
    assert np.abs(ours - torch_logits(model)).max() > 1e-3
    assert {file.tensors.dtype(name) for name in file.tensors.shapes} == {np.dtype("float32")}


def test_blocks_are_those_of_the_whole(tmp_path):
    """What a device holds of a sharded tensor, also across the rows that are put back in order."""
    tensors = read_gguf(write(tmp_path / "m.gguf", llama(), Q8_0)).tensors
    for name, shape in tensors.shapes.items():
        whole = tensors.read(name, ())
        assert whole.shape == shape
        index = (slice(3, 17), slice(5, 40))[: len(shape)]
        np.testing.assert_array_equal(tensors.read(name, index), whole[index])


def test_the_tokenizer_is_that_of_transformers(tmp_path):
    """Without torch, which their own reader of the same file needs."""
    ours = read_gguf(write(tmp_path / "m.gguf", llama(), bos=True, split="gpt-2")).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello world", " w 12 é\n\thell", "<|im_start|>hello<|im_end|> <think>", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    assert ours("hello")["input_ids"] == [1, TOKENS.index("hello")]
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2, None)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages, return_dict=False) == [1, TOKENS.index("hello"), 2]
    assert ours.decode([1, TOKENS.index("<think>"), 2], skip_special_tokens=True) == "<think>"


def test_the_rebuilt_tokenizer_is_written_in_words_that_every_version_reads(tmp_path):
    component, params = load(write(tmp_path / "m.gguf", llama(), bos=True))
    save(tmp_path / "out", component, params)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "extra_special_tokens"} & set(config)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello world 12", "<|im_start|>hello<|im_end|> <think>"):
        assert again(text)["input_ids"] == component.tokenizer(text)["input_ids"]


def test_smollm_reads_every_digit_by_itself(tmp_path):
    apart, together = (
        read_gguf(write(tmp_path / f"{split}.gguf", llama(), split=split)).tokenizer for split in ("smollm", "gpt-2")
    )
    assert apart("12")["input_ids"] == [TOKENS.index("1"), TOKENS.index("2")]
    assert together("12")["input_ids"] == [TOKENS.index("12")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2', and only 'llama' is read from GGUF"),
        ({"settings": [("llama.logit_scale", 2.0)]}, r"not known here and may change the result: logit_scale=2\.0"),
        ({"settings": [("llama.expert_count", 4.0)]}, r"expert_count=4\.0 is not supported"),
        ({"tensors": [("blk.0.attn_q_norm", np.ones(64, np.float32))]}, r"may change the result: blk\.0\.attn_q_norm"),
        ({"tensors": [("rope_freqs", np.ones(8, np.float32))]}, r"rope_freqs.weight holds the rotary scaling of Llama"),
        ({"split": "llama-bpe"}, "splits texts by 'llama-bpe' cannot be rebuilt .* pass it, tokenizer="),
    ],
)
def test_what_is_not_known_is_refused_by_name(options, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_gguf(write(tmp_path / "m.gguf", llama(), **options))


def test_the_ends_of_turns_and_messages_stop_too(tmp_path):
    """llama.cpp stops at them beside the end of sequence, which one of them may be."""
    component, _ = load(write(tmp_path / "m.gguf", llama(), ends=[("eot", TOKENS.index("<think>")), ("eom", 2)]))
    assert component.stop_tokens == (TOKENS.index("<think>"),)
    assert load(write(tmp_path / "plain.gguf", llama(), ends=[("eot", 2)]))[0].stop_tokens == ()


def test_a_given_tokenizer_takes_the_place_of_the_files_own(tmp_path):
    path = write(tmp_path / "m.gguf", llama(), split="llama-bpe")
    given = read_gguf(write(tmp_path / "other.gguf", llama())).tokenizer
    assert read_gguf(path, tokenizer=given).tokenizer is given


def test_damaged_and_missing_files_are_refused(tmp_path):
    whole = write(tmp_path / "m.gguf", llama()).read_bytes()
    path = tmp_path / "damaged.gguf"
    for content in (b"", b"no GGUF at all", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is no GGUF file or is damaged"):
            read_gguf(path)
    with pytest.raises(CheckpointError, match=r"missing\.gguf does not exist"):
        read_gguf(tmp_path / "missing.gguf")


def test_without_the_gguf_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="needs the gguf package: pip install gguf"):
        read_gguf(tmp_path / "m.gguf")
