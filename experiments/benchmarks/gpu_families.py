"""What experiments/benchmarks/gpu_check.py runs: the attention of every model family, and a tiny model of each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from experiments.benchmarks.gpu_cases import PRECISION, TINY_DECODER, TINY_UNET, Case, images, language, unet
from experiments.scaling.shapes import PIXELS_PER_LATENT, TEXT_TOKENS, EncodedText
from sysdpo_jax import FlowMatching, PixelCodec
from sysdpo_jax.models import FULL, SLIDING, MMDiT, MMDiTConfig


@dataclass(frozen=True)
class AttentionShape:
    """One attention as a released model has it; see `attend`."""

    length: int
    slots: int
    heads: int
    groups: int
    width: int
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    def cut(self, longest: int) -> "AttentionShape":
        """With lengths and window of at most `longest`, odd ones where they were odd."""

        def shorter(number: int) -> int:
            return number if number <= longest else longest - (longest - number) % 2

        window = None if self.window is None else min(self.window, longest // 2)
        return replace(self, length=shorter(self.length), slots=shorter(self.slots), window=window)


def _text(length: int, heads: int, groups: int, width: int, **rest: Any) -> AttentionShape:
    return AttentionShape(length, length, heads, groups, width, causal=True, **rest)


def _image(side: int, heads: int, width: int, slots: int | None = None) -> AttentionShape:
    return AttentionShape(side**2, side**2 if slots is None else slots, heads, heads, width)


# From the models' config.json on the Hugging Face hub; lengths as in training, odd ones among them.
ATTENTION: dict[str, AttentionShape] = {
    "llama-3.2-1b": _text(1024, 32, 8, 64),
    "llama-3-8b, odd": _text(1023, 32, 8, 128),
    "smollm2-135m": _text(512, 9, 3, 64),
    "mistral-7b, window": _text(4096, 32, 8, 128, window=2048),
    "mistral-7b, odd window": _text(2047, 32, 8, 128, window=512),
    "qwen2.5-0.5b": _text(1024, 14, 2, 64),
    "qwen3-8b": _text(1024, 32, 8, 128),
    "gemma-2-2b": _text(512, 8, 4, 256, softcap=50.0),
    "gemma-3-1b, window": _text(1024, 4, 1, 256, window=512),
    "sd-1.5, itself": _image(64, 8, 40),
    "sd-1.5, text": _image(64, 8, 40, TEXT_TOKENS),
    "sd-1.5, inner text": _image(16, 8, 160, TEXT_TOKENS),
    "sd-2.1, text": _image(64, 5, 64, TEXT_TOKENS),
    "sdxl, itself": _image(64, 10, 64),
    "sdxl, text": _image(64, 10, 64, TEXT_TOKENS),
    "sd-3, jointly": AttentionShape(4096 + 333, 4096 + 333, 24, 24, 64),
    "clip-l": _text(TEXT_TOKENS, 12, 12, 64),
    "clip-g": _text(TEXT_TOKENS, 20, 20, 64),
    "autoencoder": _image(32, 1, 512),
}

# Heads of 64, as the released models have them, so that the kernels of large models run.
_DECODER = replace(TINY_DECODER, hidden_size=128, num_attention_heads=4, head_dim=64)
_GEMMA = replace(
    _DECODER,
    head_dim=256,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
    post_norms=True,
    norm_unit_offset=True,
    scale_embeddings=True,
    query_pre_attn_scalar=256.0,
    sliding_window=8,
    layer_types=(SLIDING, FULL),
)
_DECODERS = {
    "llama": _DECODER,
    "mistral": replace(_DECODER, model_type="mistral", sliding_window=8),
    "qwen2": replace(_DECODER, model_type="qwen2", qkv_bias=True),
    "qwen3": replace(_DECODER, model_type="qwen3", qk_norm=True),
    "gemma2": replace(_GEMMA, model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": replace(_GEMMA, model_type="gemma3_text", qk_norm=True),
}
_UNET = replace(
    TINY_UNET,
    block_out_channels=(64,),
    attention_head_dim=1,
    addition_embed_type=None,
    addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None,
)
_UNETS = {
    "sd-1.5": replace(_UNET, use_linear_projection=False),
    "sd-2.1": _UNET,
    "sdxl": replace(TINY_UNET, block_out_channels=(64,), attention_head_dim=1),
}
_MMDIT = MMDiTConfig(
    sample_size=8,
    num_layers=2,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=128,
    pooled_projection_dim=16,
    pos_embed_max_size=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
    **PRECISION,
)


def _flow(config: MMDiTConfig, pixels: int) -> FlowMatching:
    side = pixels // PIXELS_PER_LATENT
    text = EncodedText(((TEXT_TOKENS, config.joint_attention_dim), (config.pooled_projection_dim,)))
    return FlowMatching(MMDiT(config), text, PixelCodec((side, side, config.in_channels)))


# {family: what makes its case}, in bfloat16; 17 tokens and 77 of text are odd lengths.
STEPS: dict[str, Callable[[], Case]] = {
    **{name: partial(language, name, config, pairs=2, length=17, rate=1e-2) for name, config in _DECODERS.items()},
    "llama, LoRA": lambda: language("llama", _DECODER, pairs=2, length=16, rate=1e-2, lora_rank=2),
    **{name: partial(unet, name, config, pairs=2, pixels=64, rate=1e-4) for name, config in _UNETS.items()},
    "sd-3": lambda: images("sd-3", _flow(_MMDIT, 64), pairs=2, pixels=64, rate=1e-4),
}
