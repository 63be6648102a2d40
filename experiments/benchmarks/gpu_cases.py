"""What gpu.py measures and gpu_check.py checks: systems of one node, random weights and batches, attentions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from experiments.common.command import read_table
from experiments.scaling import systems
from sysdpo_jax.models import DecoderConfig, MMDiT, MMDiTConfig, UNetConfig
from sysdpo_jax.training import SystemOptimizer
from sysdpo_jax.typing import Features, Params

PRECISION: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One component as a system, how it is trained, and its batch.

    size: of a batch, for people. transformation: optax's. side: the features of one side of the pairs, from a NumPy
    generator. lora_rank: 0 trains all weights, with master weights in float32.
    """

    name: str
    component: sj.Component
    size: str
    transformation: optax.GradientTransformation
    side: Callable[[np.random.Generator], Features]
    lora_rank: int = 0

    @property
    def trained(self) -> str:
        """What is trained, for people."""
        return f"LoRA {self.lora_rank}" if self.lora_rank else "all"

    @property
    def system(self) -> sj.CompoundSystem:
        return sj.CompoundSystem(("x",), (sj.Node(self.name, self.component, ("x",)),))

    @property
    def optimizer(self) -> SystemOptimizer:
        what: dict[str, Any] = {"trainable": sj.LORA_PARAMS} if self.lora_rank else {"master_weights": True}
        return sj.make_optimizer({self.name: sj.ComponentOptimizer(self.transformation, **what)})

    def params(self, key: PRNGKeyArray) -> Params:
        """Random weights, made on the device in their own precision."""
        params = self.system.init(key)
        if not self.lora_rank:
            return params
        return {self.name: sj.add_lora(params[self.name], sj.LoRA(self.lora_rank, 2.0 * self.lora_rank), key)}

    def batch(self) -> sj.PairBatch:
        """Pairs of random features, the same every time."""
        chosen, rejected = ({self.name: self.side(np.random.default_rng(seed))} for seed in (0, 1))
        return sj.PairBatch(chosen, rejected)


def language(name: str, config: DecoderConfig, pairs: int, length: int, rate: float, lora_rank: int = 0) -> Case:
    """A decoder on pairs of texts of `length` tokens, the first half of them the prompt, with AdamW."""
    model = systems.writer(replace(config, **PRECISION), length // 2, length - length // 2)

    def side(rng: np.random.Generator) -> Features:
        like: Mapping[str, Any] = systems.text_features(model, pairs)
        tokens = rng.integers(0, config.vocab_size, like["tokens"].shape, np.int32)
        # Both sides have the same prompts.
        tokens[:, : length // 2] = np.random.default_rng(2).integers(0, config.vocab_size, (pairs, length // 2))
        return {
            "tokens": tokens,
            "prompt_lengths": np.full(pairs, length // 2, np.int32),
            "lengths": np.full(pairs, length, np.int32),
            "completion": np.ones(like["completion"].shape, bool),
            "shared": np.ones(like["shared"].shape, bool),
            "truncated": np.zeros(pairs, np.float32),
            "retokenized": np.zeros(pairs, np.float32),
        }

    return Case(name, model, f"{pairs} pairs x {length} tokens", optax.adamw(rate), side, lora_rank)


def images(name: str, component: sj.Diffusion | sj.FlowMatching, pairs: int, pixels: int, rate: float) -> Case:
    """A denoiser on the latents of pairs of square images, with Adafactor."""

    def side(rng: np.random.Generator) -> Features:
        like = systems.image_features(component, pairs)
        random = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)
        random["text"]["truncated"] = np.zeros(pairs, np.float32)
        if "frames" in like:
            # SDXL's are pixels.
            random["frames"] = np.full((pairs, systems.SIZE_IDS), pixels, np.float32)
        return random

    return Case(name, component, f"{pairs} pairs x {pixels} pixels", optax.adafactor(rate), side)


def unet(name: str, config: UNetConfig, pairs: int, pixels: int, rate: float) -> Case:
    """`images` of a U-Net in bfloat16."""
    return images(name, systems.painter(replace(config, **PRECISION), pixels), pairs, pixels, rate)


# {preset: {case: what makes it}}: pairs, tokens or pixels, learning rate.
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "large": {
        "llama-3.2-1b": lambda: language("llama-3.2-1b", systems.DECODERS["llama-3.2-1b"], 8, 1024, 1e-6),
        "llama-3-8b": lambda: language(
            "llama-3-8b", systems.DECODERS["llama-3-8b"], pairs=4, length=1024, rate=1e-5, lora_rank=16
        ),
        "sdxl": lambda: unet("sdxl", systems.UNETS["sdxl"], 2, 1024, 1e-6),
    },
    "tiny": {
        "decoder": lambda: language("decoder", systems.DECODERS["tiny"], 2, 16, 1e-3, lora_rank=2),
        "unet": lambda: unet("unet", systems.UNETS["tiny"], 1, 64, 1e-4),
    },
}


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
TEXT_FAMILIES = read_table(FAMILIES, "decoders", DecoderConfig)
UNET_FAMILIES = read_table(FAMILIES, "unets", UNetConfig)
MMDIT = read_table(FAMILIES, "mmdits", MMDiTConfig)["sd-3"]


def _flow(config: MMDiTConfig, pixels: int) -> sj.FlowMatching:
    side = pixels // systems.PIXELS_PER_LATENT
    text = systems.EncodedText(((systems.TEXT_TOKENS, config.joint_attention_dim), (config.pooled_projection_dim,)))
    return sj.FlowMatching(MMDiT(config), text, sj.PixelCodec((side, side, config.in_channels)))


# {family: what makes its case}, in bfloat16; 17 tokens and 77 of text are odd lengths.
STEPS: dict[str, Callable[[], Case]] = {
    **{name: partial(language, name, config, pairs=2, length=17, rate=1e-2) for name, config in TEXT_FAMILIES.items()},
    "llama, LoRA": lambda: language("llama", TEXT_FAMILIES["llama"], pairs=2, length=16, rate=1e-2, lora_rank=2),
    **{name: partial(unet, name, config, pairs=2, pixels=64, rate=1e-4) for name, config in UNET_FAMILIES.items()},
    "sd-3": lambda: images("sd-3", _flow(replace(MMDIT, **PRECISION), 64), pairs=2, pixels=64, rate=1e-4),
}
