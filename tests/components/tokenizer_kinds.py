"""Small tokenizers of every kind, made here: the same four ids are padding, start, end of sequence and of a turn."""

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, TURN = 0, 1, 2, 3
# No tokenizer has more tokens.
SIZE = 360
WORDS = ("a", "red", "ball", "Sure", "sky", "on", ".")
LETTERS = "▁abcdehiklnorstuySIN0123?:.|[]/\n"
SPACED = ["▁ a", "S u", "u r", "Su r", "Sur e", "▁ Sure", "a b", "r e", "re d", "▁ red", "▁ ▁"]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

QWEN = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<turn>{{ m.role }}<turn>\n\n{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant<turn>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Kind(NamedTuple):
    """How to make a tokenizer, and its chat template, if it has one."""

    make: Callable[[], Tokenizer]
    template: str | None = None


def _pieces(*pieces: str) -> dict[str, int]:
    return {piece: place for place, piece in enumerate(("<pad>", "<s>", "</s>", "<end>", "<unk>", "<turn>", *pieces))}


def _joined(merges: list[str]) -> list[str]:
    return [merge.replace(" ", "") for merge in merges]


def byte_level() -> Tokenizer:
    """GPT-2's way."""
    merges = ["a b", "Ġ a", "S u", "r e", "Su re", "re d", "Ġ red", "Ċ Ċ"]
    vocab = _pieces(*sorted(pre_tokenizers.ByteLevel.alphabet()), *_joined(merges))
    made = Tokenizer(BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def words_of_llama3() -> Tokenizer:
    """With line breaks as words, as Llama 3 and Qwen have them."""
    made = byte_level()
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return made


def _with_bytes() -> Tokenizer:
    vocab = _pieces(*(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *_joined(SPACED))
    merges = [tuple(merge.split(" ")) for merge in SPACED]
    return Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))


def prepended() -> Tokenizer:
    """SentencePiece as Llama 2's tokenizer.json has it."""
    made = _with_bytes()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(list(parts))
    return made


def spaces_replaced() -> Tokenizer:
    """SentencePiece without a space in front, as Gemma's tokenizer.json has it."""
    made = _with_bytes()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def metaspace(scheme: str) -> Callable[[], Tokenizer]:
    """SentencePiece as a pre-tokenizer."""

    def make() -> Tokenizer:
        made = _with_bytes()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first")
        parts = decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Sequence(list(parts))
        return made

    return make


def unigram() -> Tokenizer:
    """T5's way."""
    pieces = [*_pieces(), *LETTERS, *_joined(SPACED)]
    made = Tokenizer(Unigram([(piece, -float(len(pieces) - place)) for place, piece in enumerate(pieces)], unk_id=4))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return made


def words() -> Tokenizer:
    """Whole words."""
    made = Tokenizer(WordLevel(_pieces(*WORDS), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = {
    "byte-level": Kind(byte_level),
    "byte-level, Qwen": Kind(words_of_llama3, QWEN),
    "byte-level, Llama 3": Kind(words_of_llama3, LLAMA3),
    "prepended": Kind(prepended),
    "prepended, Llama 2": Kind(prepended, LLAMA2),
    "prepended, Zephyr": Kind(prepended, ZEPHYR),
    "replaced, Gemma": Kind(spaces_replaced, GEMMA),
    "metaspace first": Kind(metaspace("first"), ZEPHYR),
    "metaspace never": Kind(metaspace("never")),
    "metaspace always, Llama 2": Kind(metaspace("always"), LLAMA2),
    "unigram": Kind(unigram),
    "words": Kind(words),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """With special tokens for a turn, and added ones that are not special and are no ends."""
    made = KINDS[name].make()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<end>", "<turn>")])
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    made.add_special_tokens([AddedToken("<image>", normalized=False)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=KINDS[name].template, **named)
