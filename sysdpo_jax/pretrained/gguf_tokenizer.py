"""The byte-level BPE tokenizer that a GGUF file describes, rebuilt from its metadata."""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from sysdpo_jax.pretrained.base import CheckpointError

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
