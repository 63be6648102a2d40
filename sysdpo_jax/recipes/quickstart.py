"""The models and the judge of sysdpo_jax/recipes/quickstart.yaml: tiny writers, and a taste for short answers."""

from collections.abc import Mapping
from typing import Any

from sysdpo_jax.components import LanguageModel
from sysdpo_jax.models.decoder import Decoder, DecoderConfig

# Some words of the questions, in which the writers answer; they read the others as [unk].
WORDS = "colour grass capital italy france sky wheels car hens bark animal day night snow ice months red green blue"
SPECIAL = ("[pad]", "[end]", "[unk]")


def small_writer(max_prompt_length: int, max_new_tokens: int, width: int = 32, layers: int = 2) -> LanguageModel:
    """A language model with random weights, which is made in a moment and knows nothing.

    Args:
        max_prompt_length: In words.
        max_new_tokens: In words.
        width: Of the hidden states.
        layers: Of the decoder.
    """
    # Importing them takes longer than the rest of the library.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS.split()))}
    inner = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", eos_token="[end]", unk_token="[unk]")
    config = DecoderConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_prompt_length + max_new_tokens,
        tie_word_embeddings=True,
    )
    return LanguageModel(Decoder(config), tokenizer, max_prompt_length, max_new_tokens)


def brevity(run: Mapping[str, Any]) -> float:
    """1 for an answer of one word, 0.5 of two, and so on; 0 for none."""
    words = len(run["answer"].split())
    return 1 / words if words else 0.0
