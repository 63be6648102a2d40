"""The text side of Stable Diffusion XL and 3: several encoders whose states are joined, and a pooled summary.

Axes: B batch, S text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from sysdpo_jax.components.text import CaptionTruncation, check_truncation, conditioning_shapes, tokenize
from sysdpo_jax.models.clip import CLIPTextEncoder
from sysdpo_jax.models.t5 import T5Encoder
from sysdpo_jax.typing import Features, Params


@dataclass(frozen=True)
class SDXLText:
    """Conditioning (text [B, S, D1 + D2], pooled [B, P]), then the frames (arXiv 2307.01952, section 2.1 and 2.2).

    The text is the penultimate hidden state of two CLIP encoders side by side, the summary the second one's projected
    state at the end of the text. They are called "text_encoder" and "text_encoder_2".

    Args:
        encoder: The first one.
        encoder_2: The second one, with a projection.
        tokenizer: Of the first one, from transformers.
        tokenizer_2: Of the second one.
        length: Captions are padded to so many tokens.
        truncation: "error" refuses a longer caption, "keep_start" cuts it as diffusers does.
        zero_null: The null condition is all zeros (SDXL's base model), else that of the empty caption.
    """

    encoder: CLIPTextEncoder
    encoder_2: CLIPTextEncoder
    tokenizer: Any = field(compare=False, repr=False)
    tokenizer_2: Any = field(compare=False, repr=False)
    length: int = 77
    truncation: CaptionTruncation = "error"
    zero_null: bool = True

    def __post_init__(self) -> None:
        check_truncation(self.truncation)

    @property
    def sized(self) -> bool:
        return True

    def init(self, key: PRNGKeyArray) -> Params:
        return init_encoders({"text_encoder": self.encoder, "text_encoder_2": self.encoder_2}, self.length, key)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return conditioning_shapes(self)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        tokens, cut = tokenize(self.tokenizer, captions, self.length, self.truncation)
        tokens_2, cut_2 = tokenize(self.tokenizer_2, captions, self.length, self.truncation)
        kept = np.array([not (self.zero_null and caption is None) for caption in captions], np.float32)
        return {
            "tokens": tokens,
            "tokens_2": tokens_2,
            "kept": kept,
            "truncated": np.maximum(cut, cut_2),
        }

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        first = clip_outputs(self.encoder, params["text_encoder"], features["tokens"])
        second = clip_outputs(self.encoder_2, params["text_encoder_2"], features["tokens_2"])
        kept = jnp.asarray(features["kept"])
        text = jnp.concatenate([first.penultimate, second.penultimate], axis=-1) * kept[:, None, None]
        return text, second.pooled * kept[:, None]


@dataclass(frozen=True)
class SD3Text:
    """Conditioning (text [B, S + S3, D3], pooled [B, P1 + P2]) (arXiv 2403.03206, section 4).

    Penultimate states of two CLIP encoders side by side, padded with zeros to T5's width, then T5's states; the summary
    is both CLIP projections. They are called "text_encoder", "text_encoder_2" and "text_encoder_3".

    Args:
        encoder: The first CLIP encoder.
        encoder_2: The second one.
        encoder_3: T5. None leaves it out, its length_3 states being zeros of width_3, as diffusers does.
        tokenizer: Of the first encoder, from transformers.
        tokenizer_2: Of the second one.
        tokenizer_3: Of T5.
        width_3: Of T5's states.
        length: Captions are padded to so many tokens for CLIP,
        length_3: and to so many for T5.
        truncation: "error" refuses a longer caption, "keep_start" cuts it as diffusers does.
    """

    encoder: CLIPTextEncoder
    encoder_2: CLIPTextEncoder
    encoder_3: T5Encoder | None
    tokenizer: Any = field(compare=False, repr=False)
    tokenizer_2: Any = field(compare=False, repr=False)
    tokenizer_3: Any = field(compare=False, repr=False)
    width_3: int = 4096
    length: int = 77
    length_3: int = 256
    truncation: CaptionTruncation = "error"

    def __post_init__(self) -> None:
        check_truncation(self.truncation)

    @property
    def sized(self) -> bool:
        return False

    def init(self, key: PRNGKeyArray) -> Params:
        encoders = {"text_encoder": self.encoder, "text_encoder_2": self.encoder_2, "text_encoder_3": self.encoder_3}
        return init_encoders({name: module for name, module in encoders.items() if module is not None}, 2, key)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return conditioning_shapes(self)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        # CLIP sees the start of a caption that only T5 has room for; without T5 the whole must fit.
        clip_truncation: CaptionTruncation = "keep_start" if self.encoder_3 is not None else self.truncation
        tokens, cut = tokenize(self.tokenizer, captions, self.length, clip_truncation)
        tokens_2, cut_2 = tokenize(self.tokenizer_2, captions, self.length, clip_truncation)
        features = {"tokens": tokens, "tokens_2": tokens_2, "truncated": np.maximum(cut, cut_2)}
        if self.encoder_3 is not None:
            tokens_3, cut_3 = tokenize(self.tokenizer_3, captions, self.length_3, self.truncation)
            features |= {"tokens_3": tokens_3, "truncated": cut_3}
        return features

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        first = clip_outputs(self.encoder, params["text_encoder"], features["tokens"])
        second = clip_outputs(self.encoder_2, params["text_encoder_2"], features["tokens_2"])
        clip = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, self.width_3 - clip.shape[-1])))
        if self.encoder_3 is None:
            third = jnp.zeros((clip.shape[0], self.length_3, self.width_3), clip.dtype)
        else:
            # No mask: the padding of T5 is seen, as in the pipeline that the model was released with.
            third = self.encoder_3.apply({"params": params["text_encoder_3"]}, features["tokens_3"])  # type: ignore[assignment]
        return jnp.concatenate([clip, third], axis=1), jnp.concatenate([first.pooled, second.pooled], axis=-1)


def clip_outputs(encoder: CLIPTextEncoder, params: Params, tokens: Any) -> Any:
    """The encoder's `outputs` (last, penultimate, pooled)."""
    return encoder.apply({"params": params}, jnp.asarray(tokens), method="outputs")


def init_encoders(encoders: dict[str, Any], length: int, key: PRNGKeyArray) -> dict[str, Params]:
    """Fresh parameters of each module that reads token ids."""
    tokens = jnp.zeros((1, length), jnp.int32)
    keys = dict(zip(encoders, jax.random.split(key, len(encoders)), strict=True))
    return {name: module.init(keys[name], tokens)["params"] for name, module in encoders.items()}
