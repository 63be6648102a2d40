"""Small models with a formula that NumPy can repeat, and a tokenizer of whole words."""

import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = ("a", "red", "green", "ball", "cube", "small", "large", "on", "the", "left")


def word_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Token ids 0..3 are <pad> <bos> <eos> <unk>, then WORDS; with `bos` every text begins with <bos> by default."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    if bos:
        made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


class Embedding(nn.Module):
    """A text encoder that looks each token up."""

    width: int = 4

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(len(SPECIAL) + len(WORDS), self.width, name="table")(tokens)


class Affine(nn.Module):
    """A denoiser: latents @ mix + mean over tokens of (text @ read) + time / 1000 * drift."""

    @nn.compact
    def __call__(self, latents, time, text):
        channels, normal = latents.shape[-1], nn.initializers.normal(0.5)
        mix = self.param("mix", normal, (channels, channels))
        read = self.param("read", normal, (text.shape[-1], channels))
        drift = self.param("drift", normal, (channels,))
        return latents @ mix + (text @ read).mean(1)[:, None, None] + (time / 1000)[:, None, None, None] * drift


def affine_by_hand(params, noisy, time, tokens):
    """What Affine answers on Embedding's texts, in float64 NumPy; params as `TextToImage.init` returns them."""
    mix, read, drift = (np.asarray(params["denoiser"][name], np.float64) for name in ("mix", "read", "drift"))
    text = np.asarray(params["text_encoder"]["table"]["embedding"], np.float64)[np.asarray(tokens)]
    noisy, time = np.asarray(noisy, np.float64), np.asarray(time, np.float64)
    return noisy @ mix + (text @ read).mean(1)[:, None, None] + (time / 1000)[:, None, None, None] * drift
