"""Models by shape alone: components and prepared features of published models, without weights, tokenizers or data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from experiments.common.command import read_table
from sysdpo_jax import Diffusion, FlowMatching, LanguageModel, PixelCodec
from sysdpo_jax.models import Decoder, DecoderConfig, UNet2DCondition, UNetConfig
from sysdpo_jax.typing import Features, Params

SHAPES = Path(__file__).with_name("shapes.yaml")
DECODERS, UNETS = read_table(SHAPES, "decoders", DecoderConfig), read_table(SHAPES, "unets", UNetConfig)
PIXELS_PER_LATENT = 8
TEXT_TOKENS, SIZE_IDS = 77, 6


@dataclass(frozen=True)
class EncodedText:
    """Conditioning that comes encoded, as of `FrozenText`; rows: shapes of its arrays without their batch axis.

    sized: whether the denoiser is told how its image was cut out.

    Its features are made by shape, so that `prepare` has nothing to do; it raises NotImplementedError.
    """

    rows: tuple[tuple[int, ...], ...]
    sized: bool = False

    def init(self, key: PRNGKeyArray) -> Params:
        return {}

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct((1, *row), jnp.float32) for row in self.rows)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        raise NotImplementedError("EncodedText: these features come from their shapes, not from captions")

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        return tuple(features["encoded"])


def encoded_text(config: UNetConfig) -> EncodedText:
    """That of a U-Net: the caption's tokens and, for SDXL, the pooled text, then the frames."""
    text = (TEXT_TOKENS, config.cross_attention_dim)
    if config.addition_embed_type is None:
        return EncodedText((text,))
    sizes = SIZE_IDS * (config.addition_time_embed_dim or 0)
    return EncodedText((text, ((config.projection_class_embeddings_input_dim or 0) - sizes,)), sized=True)


def writer(config: DecoderConfig, prompt: int, new: int) -> LanguageModel:
    """A language model that can only be given features. prompt, new: their room in tokens."""
    return LanguageModel(Decoder(config), SimpleNamespace(eos_token_id=1, pad_token_id=0), prompt, new)


def painter(config: UNetConfig, pixels: int) -> Diffusion:
    """An epsilon diffusion model of square images, of whose codec only the latents' shape is known."""
    side = pixels // PIXELS_PER_LATENT
    return Diffusion(UNet2DCondition(config), encoded_text(config), PixelCodec((side, side, config.in_channels)))


def text_features(component: LanguageModel, *leading: int) -> dict[str, Any]:
    """Shapes of what `prepare` makes of texts; leading: the batch and, where there is one, the plate."""
    length = component.max_prompt_length + component.max_new_tokens
    count = jax.ShapeDtypeStruct(leading, jnp.int32)
    return {
        "tokens": jax.ShapeDtypeStruct((*leading, length), jnp.int32),
        "prompt_lengths": count,
        "lengths": count,
        "completion": jax.ShapeDtypeStruct((*leading, component.max_new_tokens), jnp.bool_),
        "truncated": jax.ShapeDtypeStruct(leading, jnp.float32),
        "retokenized": jax.ShapeDtypeStruct(leading, jnp.float32),
    }


def image_features(component: Diffusion | FlowMatching, *leading: int) -> dict[str, Any]:
    """Shapes of what `prepare` makes of images and captions."""
    encoded = tuple(jax.ShapeDtypeStruct((*leading, *s.shape[1:]), s.dtype) for s in component.text.shapes())
    return {
        "latents": jax.ShapeDtypeStruct((*leading, *component.codec.latent_shape), jnp.float32),
        "text": {"encoded": encoded, "truncated": jax.ShapeDtypeStruct(leading, jnp.float32)},
        **({"frames": jax.ShapeDtypeStruct((*leading, SIZE_IDS), jnp.float32)} if component.text.sized else {}),
    }
