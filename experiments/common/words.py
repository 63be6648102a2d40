"""A tokenizer of whole words, for models that are trained on a world of few of them."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word of the vocabulary, and "<pad>", "<eos>" and "<unk>" in front of them."""
    special = ("<pad>", "<eos>", "<unk>")
    words = {word: number for number, word in enumerate((*special, *vocabulary))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
