"""What experiments/benchmarks/gpu_check.py runs: the attention of every model family, and a tiny model of each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from experiments.benchmarks.gpu_cases import PRECISION, Case, images, language, unet
from experiments.common.command import read_table
from experiments.scaling.shapes import PIXELS_PER_LATENT, TEXT_TOKENS, EncodedText
from sysdpo_jax import FlowMatching, PixelCodec
from sysdpo_jax.models import DecoderConfig, MMDiT, MMDiTConfig, UNetConfig


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


FAMILIES = Path(__file__).with_name("gpu_families.yaml")
ATTENTION = read_table(FAMILIES, "attention", AttentionShape)
DECODERS, UNETS = read_table(FAMILIES, "decoders", DecoderConfig), read_table(FAMILIES, "unets", UNetConfig)
MMDITS = read_table(FAMILIES, "mmdits", MMDiTConfig)


def _flow(config: MMDiTConfig, pixels: int) -> FlowMatching:
    side = pixels // PIXELS_PER_LATENT
    text = EncodedText(((TEXT_TOKENS, config.joint_attention_dim), (config.pooled_projection_dim,)))
    return FlowMatching(MMDiT(config), text, PixelCodec((side, side, config.in_channels)))


# {family: what makes its case}, in bfloat16; 17 tokens and 77 of text are odd lengths.
STEPS: dict[str, Callable[[], Case]] = {
    **{name: partial(language, name, config, pairs=2, length=17, rate=1e-2) for name, config in DECODERS.items()},
    "llama, LoRA": lambda: language("llama", DECODERS["llama"], pairs=2, length=16, rate=1e-2, lora_rank=2),
    **{name: partial(unet, name, config, pairs=2, pixels=64, rate=1e-4) for name, config in UNETS.items()},
    "sd-3": lambda: images("sd-3", _flow(replace(MMDITS["sd-3"], **PRECISION), 64), pairs=2, pixels=64, rate=1e-4),
}
