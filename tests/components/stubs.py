"""Small models with a formula that NumPy can repeat, and a tokenizer of whole words."""

from types import SimpleNamespace

import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = ("a", "red", "green", "ball", "cube", "small", "large", "on", "the", "left")


# A turn is "the <role> on <content> <eos> large": its end is followed by more, as in templates with a line break there.
CHAT_TEMPLATE = (
    "{% for m in messages %}the {{ m.role }} on {{ m.content }} <eos> large {% endfor %}"
    "{% if add_generation_prompt %}the assistant on {% endif %}"
)


def word_tokenizer(bos: bool = False, eos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Token ids 0..3 are <pad> <bos> <eos> <unk>, then WORDS.

    bos, eos: every text begins with <bos>, ends with <eos> by default. chat: with CHAT_TEMPLATE; roles are <unk>.
    """
    made = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    if bos or eos:
        template = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
        made.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def byte_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the alphabet's 256 ids in their sorted order, one id for each merge ("a b"), then <eos>."""
    pieces = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    pairs = [tuple(merge.split()) for merge in merges]
    made = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


class IdTokenizer(SimpleNamespace):
    """What the component asks of a tokenizer when its features come ready: two ids."""

    def __init__(self):
        super().__init__(eos_token_id=1, pad_token_id=0)


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
    text = np.asarray(params["text"]["text_encoder"]["table"]["embedding"], np.float64)[np.asarray(tokens)]
    noisy, time = np.asarray(noisy, np.float64), np.asarray(time, np.float64)
    return noisy @ mix + (text @ read).mean(1)[:, None, None] + (time / 1000)[:, None, None, None] * drift
