"""What experiments/benchmarks/gpu.py measures: systems of one node, their random weights and batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from experiments.scaling.shapes import DECODERS, SIZE_IDS, UNETS, image_features, painter, text_features, writer
from sysdpo_jax import (
    LORA_PARAMS,
    Component,
    ComponentOptimizer,
    CompoundSystem,
    Diffusion,
    FlowMatching,
    LoRA,
    Node,
    PairBatch,
    add_lora,
    make_optimizer,
)
from sysdpo_jax.models import DecoderConfig, UNetConfig
from sysdpo_jax.training import SystemOptimizer
from sysdpo_jax.typing import Features, Params

PRECISION: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"}


@dataclass(frozen=True)
class Case:
    """One component as a system, how it is trained, and its batch.

    size: of a batch, for people. transformation: optax's. side: the features of one side of the pairs, from a NumPy
    generator. lora_rank: 0 trains all weights, with master weights in float32.
    """

    name: str
    component: Component
    size: str
    transformation: optax.GradientTransformation
    side: Callable[[np.random.Generator], Features]
    lora_rank: int = 0

    @property
    def trained(self) -> str:
        """What is trained, for people."""
        return f"LoRA {self.lora_rank}" if self.lora_rank else "all"

    @property
    def system(self) -> CompoundSystem:
        return CompoundSystem(("x",), (Node(self.name, self.component, ("x",)),))

    @property
    def optimizer(self) -> SystemOptimizer:
        if self.lora_rank:
            component = ComponentOptimizer(self.transformation, trainable=LORA_PARAMS)
        else:
            component = ComponentOptimizer(self.transformation, master_weights=True)
        return make_optimizer({self.name: component})

    def params(self, key: PRNGKeyArray) -> Params:
        """Random weights, made on the device in their own precision."""
        params = jax.jit(self.system.init)(key)
        if not self.lora_rank:
            return params
        return {self.name: add_lora(params[self.name], LoRA(self.lora_rank, 2.0 * self.lora_rank), key)}

    def batch(self) -> PairBatch:
        """Pairs of random features, the same every time."""
        chosen, rejected = ({self.name: self.side(np.random.default_rng(seed))} for seed in (0, 1))
        return PairBatch(chosen, rejected)


def language(name: str, config: DecoderConfig, pairs: int, length: int, rate: float, lora_rank: int = 0) -> Case:
    """A decoder on pairs of texts of `length` tokens, the first half of them the prompt, with AdamW."""
    model = writer(replace(config, **PRECISION), length // 2, length - length // 2)

    def side(rng: np.random.Generator) -> Features:
        shapes: Mapping[str, Any] = text_features(model, pairs)
        return {
            "tokens": rng.integers(0, config.vocab_size, shapes["tokens"].shape, np.int32),
            "prompt_lengths": np.full(pairs, length // 2, np.int32),
            "lengths": np.full(pairs, length, np.int32),
            "completion": np.ones(shapes["completion"].shape, bool),
            "truncated": np.zeros(pairs, np.float32),
            "retokenized": np.zeros(pairs, np.float32),
        }

    return Case(name, model, f"{pairs} pairs x {length} tokens", optax.adamw(rate), side, lora_rank)


def images(name: str, component: Diffusion | FlowMatching, pairs: int, pixels: int, rate: float) -> Case:
    """A denoiser on the latents of pairs of square images, with Adafactor."""

    def side(rng: np.random.Generator) -> Features:
        shapes = image_features(component, pairs)
        random = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
        random["text"]["truncated"] = np.zeros(pairs, np.float32)
        # SDXL's frames are pixels.
        return random | {name: np.full((pairs, SIZE_IDS), pixels, np.float32) for name in ("frames",) if name in shapes}

    return Case(name, component, f"{pairs} pairs x {pixels} pixels", optax.adafactor(rate), side)


def unet(name: str, config: UNetConfig, pairs: int, pixels: int, rate: float) -> Case:
    """`images` of a U-Net in bfloat16."""
    return images(name, painter(replace(config, **PRECISION), pixels), pairs, pixels, rate)


# {preset: {case: what makes it}}: pairs, tokens or pixels, learning rate.
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "large": {
        "llama-3.2-1b": lambda: language("llama-3.2-1b", DECODERS["llama-3.2-1b"], 8, 1024, 1e-6),
        "llama-3-8b": lambda: language(
            "llama-3-8b", DECODERS["llama-3-8b"], pairs=4, length=1024, rate=1e-5, lora_rank=16
        ),
        "sdxl": lambda: unet("sdxl", UNETS["sdxl"], 2, 1024, 1e-6),
    },
    "tiny": {
        "decoder": lambda: language("decoder", DECODERS["tiny"], 2, 16, 1e-3, lora_rank=2),
        "unet": lambda: unet("unet", UNETS["tiny"], 1, 64, 1e-4),
    },
}
