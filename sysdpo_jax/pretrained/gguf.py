"""GGUF files of the Llama architecture: configuration, weights and byte-level BPE tokenizer out of one file.

The gguf package parses the file and dequantises. llama.cpp keeps the two halves of a rotary pair beside each other
where Hugging Face keeps them half a head apart, so the rows of query and key weights are put back in order here.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.names import Index

TENSORS = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}


class GGUFTensors:
    """The tensors of a GGUF file: blocks in float32, dequantised row by row when they are read.

    Raises `CheckpointError` listing the tensors that have no place in a Llama.
    """

    def __init__(self, package: ModuleType, tensors: Mapping[str, Any], config: Mapping[str, Any], where: str):
        self.where = where
        self._package = package
        self._heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self._tensors: dict[str, Any] = {}
        unknown = []
        for name, tensor in tensors.items():
            pattern = next((pattern for pattern in TENSORS if re.fullmatch(pattern, name)), None)
            if pattern is None:
                unknown.append(name)
            else:
                self._tensors[re.sub(pattern, TENSORS[pattern], name)] = tensor
        if unknown:
            hint = ""
            if "rope_freqs.weight" in unknown:
                hint = " (rope_freqs.weight holds the rotary scaling of Llama 3.1 and later)"
            raise CheckpointError(
                f"{where} holds tensors that are not known here and may change the result: "
                f"{', '.join(sorted(unknown))}{hint}. Load the model's folder of config.json and safetensors instead"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF names the fastest axis first.
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """float32 for all: files mix precisions, and quantised weights have none."""
        return np.dtype("float32")

    def read(self, name: str, index: Index) -> np.ndarray:
        """A block of a tensor; an empty index stands for the whole."""
        tensor = self._tensors[name]
        rows, rest = (index[0], index[1:]) if index else (slice(None), ())
        projection = re.search(r"self_attn\.([qk])_proj", name)
        picked = rows if projection is None else _hf_rows(len(tensor.data), self._heads[projection[1]])[rows]
        try:
            values = self._package.dequantize(tensor.data[picked], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"{self.where}: tensor {tensor.name!r} is stored as {kind}, which the gguf package cannot dequantise: "
                "fetch the model in another quantisation"
            ) from None
        # A copy: what is read must not keep the file's pages.
        return np.array(values[(slice(None), *rest)], np.float32)


class GGUF(NamedTuple):
    """What a file holds: config as in Hugging Face's config.json, tensors under Hugging Face's names, tokenizer."""

    config: dict[str, Any]
    tensors: GGUFTensors
    tokenizer: Any


def read_gguf(path: str | Path, tokenizer: Any = None) -> GGUF:
    """The parts of a GGUF file of architecture "llama", with its weights dequantised to float32 when they are read.

    tokenizer: takes the place of the file's own.
    Raises `CheckpointError` for another architecture, a setting or tensor that is not known, a tokenizer that cannot be
    rebuilt, a damaged file, and without the gguf package.
    """
    where = str(path)
    package = _package(where)
    try:
        reader = package.GGUFReader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{where} does not exist: give the path of the .gguf file") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{where} is no GGUF file or is damaged ({error}): fetch it again") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{where} holds a model of architecture {architecture!r}, and only 'llama' is read from GGUF: load the "
            "model's folder of config.json and safetensors instead"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, where)
    source = GGUFTensors(package, tensors, config, where)
    return GGUF(config, source, read_tokenizer(fields, where) if tokenizer is None else tokenizer)


def _hf_rows(rows: int, heads: int) -> np.ndarray:
    """Where each row of Hugging Face's query or key weight lies in llama.cpp's, whose axes are head, pair, half."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Hugging Face's config.json of the file's metadata."""
    given = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    reader = ConfigReader(given, f"{where} (metadata llama.*)")
    heads, hidden = reader.take("attention.head_count"), reader.take("embedding_length")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{where} has no tensor token_embd.weight: it is no whole model, or one part of several")
    width = reader.take("attention.key_length", hidden // heads)
    reader.expect("attention.value_length", width)
    reader.expect("rope.dimension_count", width)
    reader.expect("rope.scaling.type", "none")
    reader.expect("expert_count", 0)
    reader.expect("expert_used_count", 0)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": reader.take("vocab_size", int(embedding.shape[1])),
        "hidden_size": hidden,
        "intermediate_size": reader.take("feed_forward_length"),
        "num_hidden_layers": reader.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.take("attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": _decimal(reader.take("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(reader.take("rope.freq_base", 10000.0)),
        "max_position_embeddings": reader.take("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    reader.finish()
    special = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{name}_token_id": fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in special.items()}
    # The ends of a turn and of a message, at which llama.cpp stops too.
    others = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    ends = [end for end in dict.fromkeys((ids["eos_token_id"], *others)) if end is not None]
    ids["eos_token_id"] = ends if len(ends) > 1 else ids["eos_token_id"]
    return config | {name: value for name, value in ids.items() if value is not None}


def _decimal(value: float) -> float:
    """1e-05 of 9.999999747378752e-06: the file holds the float32 nearest to what the configuration said."""
    return float(str(np.float32(value)))


def _package(where: str) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"reading {where} needs the gguf package: pip install gguf") from None
    return gguf


# llama.cpp's types of tokens that are found in a text before it is split.
CONTROL, USER_DEFINED = 3, 4


def _digits_apart() -> Any:
    """GPT-2's words with every digit a word (SmolLM)."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _words() -> Any:
    """GPT-2's words."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# How a text is split into words, under the names of `tokenizer.ggml.pre`.
SPLITS: Mapping[str, Callable[[], Any]] = {"gpt-2": _words, "smollm": _digits_apart}


def read_tokenizer(fields: Mapping[str, Any], where: str) -> Any:
    """A PreTrainedTokenizerFast with the file's special tokens and chat template. fields: the file's metadata.

    Raises `CheckpointError` for a tokenizer of another kind, or one that splits texts in a way that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    kind, split = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"{where}: a tokenizer of model {kind!r} that splits texts by {split!r} cannot be rebuilt (only 'gpt2' "
            f"with {' or '.join(map(repr, SPLITS))}): pass it, tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(BPE({token: place for place, token in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = SPLITS[split](), decoders.ByteLevel()
    kinds = list(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    made.add_special_tokens([AddedToken(token, normalized=False) for token, type_ in kinds if type_ == CONTROL])
    made.add_tokens([AddedToken(token, normalized=False) for token, type_ in kinds if type_ == USER_DEFINED])
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in special.items()}
    named = {name: tokens[place] for name, place in ids.items() if place is not None}
    begin, end = (
        [named[f"{name}_token"]] if fields.get(f"tokenizer.ggml.add_{name}_token", False) else []
        for name in ("bos", "eos")
    )
    if begin or end:
        made.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=[(token, tokens.index(token)) for token in {*begin, *end}]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
