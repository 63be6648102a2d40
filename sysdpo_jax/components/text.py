"""What a denoiser is told about its caption: conditioners, trained with the denoiser or frozen.

Those of Stable Diffusion XL and 3 join the states of several encoders, and add a pooled summary.
Axes: B batch, S text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, PRNGKeyArray

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.models.clip import CLIPTextEncoder
from sysdpo_jax.models.initial import fresh_params
from sysdpo_jax.models.t5 import T5Encoder
from sysdpo_jax.typing import Features, Params

# What becomes of a caption without room: refused, or its first tokens are kept, as diffusers does.
CaptionTruncation = Literal["error", "keep_start"]


@runtime_checkable
class TextConditioner(Protocol):
    """Captions -> the arrays that a denoiser takes after the time, in two steps: host side, then jittable.

    Its parameters are the entry "text" of the component's, trained with the denoiser unless it is `FrozenText`.
    Subclass this protocol to inherit what has a default.
    """

    @property
    def sized(self) -> bool:
        """Whether the denoiser is told after them how its image was cut out: the frame, see `images.Fitted`."""
        return False

    def init(self, key: PRNGKeyArray) -> Params:
        """Make fresh parameters.

        Args:
            key: Of the draws.

        Returns:
            The encoders' trees by name.
        """
        ...

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the denoiser is given of one caption.

        Returns:
            The shapes and types of the conditioning's arrays, with a batch axis of 1; nothing is computed.
        """
        return _shapes(cast(Any, self))

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        """Tokenize captions, on the host.

        Args:
            captions: None stands for the null condition of guidance.

        Returns:
            NumPy features with a leading batch axis; "truncated" [B] is 1 where a caption was cut.

        Raises:
            RecordError: For a caption that is too long when such captions are not cut.
        """
        ...

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        """Make the denoiser's conditioning. Jittable.

        Args:
            params: The encoders' trees by name.
            features: As `prepare` made them.

        Returns:
            Arrays with a leading batch axis each.
        """
        ...


@dataclass(frozen=True)
class TextEncoder(TextConditioner):
    """One module, token ids [B, S] -> [B, S, D], called "text_encoder": Stable Diffusion 1 and 2, small systems.

    Args:
        encoder: The module.
        tokenizer: From transformers, with a padding token.
        length: Captions are padded to so many tokens.
        truncation: "error" refuses a longer caption, "keep_start" cuts it as diffusers does.
    """

    encoder: nn.Module
    tokenizer: Any = field(compare=False, repr=False)
    length: int = 77
    truncation: CaptionTruncation = "error"

    def __post_init__(self) -> None:
        check_truncation(self.truncation)

    def init(self, key: PRNGKeyArray) -> Params:
        tokens = jax.ShapeDtypeStruct((1, self.length), jnp.int32)
        return {"text_encoder": fresh_params(self.encoder, key, tokens)}

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        return _tokens({"tokens": self.tokenizer}, captions, self.length, self.truncation)

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        text: Any = self.encoder.apply({"params": params["text_encoder"]}, features["tokens"])
        return (text,)


@dataclass(frozen=True)
class FrozenText(TextConditioner):
    """A conditioner that is not trained: its states are made once, by `encode`, and never in the step.

    Args:
        text: The conditioner.
        batch_size: Captions that it handles at once.
    """

    text: TextConditioner
    batch_size: int = 16

    @property
    def sized(self) -> bool:
        return self.text.sized

    def init(self, key: PRNGKeyArray) -> Params:
        return self.text.init(key)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.text.shapes()

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        return self.text.prepare(captions)

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        return self.text.encode(params, features)


@dataclass(frozen=True)
class SDXLText(TextConditioner):
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
        return _init({"text_encoder": self.encoder, "text_encoder_2": self.encoder_2}, key)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        kept = np.array([not (self.zero_null and caption is None) for caption in captions], np.float32)
        tokenizers = {"tokens": self.tokenizer, "tokens_2": self.tokenizer_2}
        return _tokens(tokenizers, captions, self.length, self.truncation) | {"kept": kept}

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        text, (_, pooled) = _clip_states(self, params, features)
        kept = jnp.asarray(features["kept"])
        return text * kept[:, None, None], pooled * kept[:, None]


@dataclass(frozen=True)
class SD3Text(TextConditioner):
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

    def init(self, key: PRNGKeyArray) -> Params:
        third = {} if self.encoder_3 is None else {"text_encoder_3": self.encoder_3}
        return _init({"text_encoder": self.encoder, "text_encoder_2": self.encoder_2, **third}, key)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        tokenizers = {"tokens": self.tokenizer, "tokens_2": self.tokenizer_2}
        if self.encoder_3 is None:
            return _tokens(tokenizers, captions, self.length, self.truncation)
        # CLIP sees the start of a caption that only T5 has room for.
        features = _tokens(tokenizers, captions, self.length, "keep_start")
        return features | _tokens({"tokens_3": self.tokenizer_3}, captions, self.length_3, self.truncation)

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        clip, pooled = _clip_states(self, params, features)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, self.width_3 - clip.shape[-1])))
        if self.encoder_3 is None:
            third: Any = jnp.zeros((clip.shape[0], self.length_3, self.width_3), clip.dtype)
        else:
            # No mask: the padding of T5 is seen, as in the pipeline that the model was released with.
            third = self.encoder_3.apply({"params": params["text_encoder_3"]}, features["tokens_3"])
        return jnp.concatenate([clip, third], axis=1), jnp.concatenate(pooled, axis=-1)


@cache
def _shapes(text: TextConditioner) -> tuple[jax.ShapeDtypeStruct, ...]:
    features = text.prepare([""])
    return jax.eval_shape(lambda key, given: text.encode(text.init(key), given), jax.random.key(0), features)


def _init(encoders: Mapping[str, nn.Module], key: PRNGKeyArray) -> Params:
    keys, tokens = jax.random.split(key, len(encoders)), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    made = zip(encoders.items(), keys, strict=True)
    return {name: fresh_params(encoder, own, tokens) for (name, encoder), own in made}


def _clip_states(text: SDXLText | SD3Text, params: Params, features: dict[str, Features]) -> tuple[Array, list[Array]]:
    """The penultimate states of both encoders side by side, and the pooled ones of each."""
    both = (text.encoder, "text_encoder", "tokens"), (text.encoder_2, "text_encoder_2", "tokens_2")
    made: list[Any] = [
        encoder.apply({"params": params[name]}, jnp.asarray(features[tokens]), method="outputs")
        for encoder, name, tokens in both
    ]
    return jnp.concatenate([one.penultimate for one in made], axis=-1), [one.pooled for one in made]


def check_truncation(truncation: str) -> None:
    """Raise `ValueError` for a setting that captions do not know."""
    known = get_args(CaptionTruncation)
    if truncation not in known:
        raise ValueError(f"truncation {truncation!r} of captions is none of {', '.join(known)}")


def _tokens(
    tokenizers: Mapping[str, Any], captions: Sequence[str | None], length: int, truncation: CaptionTruncation
) -> dict[str, Features]:
    """Token ids of each tokenizer padded to `length`, and "truncated". None reads as the empty caption."""
    texts = ["" if caption is None else caption for caption in captions]
    made: dict[str, Features] = {"truncated": np.zeros(len(texts), np.float32)}
    for name, tokenizer in tokenizers.items():
        if not texts:
            made[name] = np.zeros((0, length), np.int32)
            continue
        # Too long a caption is our business below, not a warning of the tokenizer's.
        sizes = np.array([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
        row = int(np.argmax(sizes > length))
        if sizes[row] > length and truncation == "error":
            raise RecordError(
                f"caption in row {row} has {sizes[row]} tokens, more than the {length} of the text encoder: shorten "
                f"{texts[row]!r}, or cut captions with truncation='keep_start'"
            )
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
        made[name] = np.asarray(ids, np.int32)
        made["truncated"] = np.maximum(made["truncated"], (sizes > length).astype(np.float32))
    return made
