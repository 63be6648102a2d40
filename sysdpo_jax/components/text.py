"""What a denoiser is told about its caption: conditioners, trained with the denoiser or frozen.

Axes: B batch, S text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.typing import Features, Params

# What becomes of a caption without room: refused, or its first tokens are kept, as diffusers does.
CaptionTruncation = Literal["error", "keep_start"]


@runtime_checkable
class TextConditioner(Protocol):
    """Captions -> the arrays that a denoiser takes after the time, in two steps: host side, then jittable.

    Its parameters are the entry "text" of the component's, trained with the denoiser unless it is `FrozenText`.
    """

    @property
    def sized(self) -> bool:
        """Whether the denoiser is told after them how its image was cut out: the frame, see `images.Fitted`."""
        ...

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
            The shapes and types of the conditioning's arrays, with a batch axis of 1.
        """
        ...

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
class TextEncoder:
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

    @property
    def sized(self) -> bool:
        return False

    def init(self, key: PRNGKeyArray) -> Params:
        return {"text_encoder": self.encoder.init(key, jnp.zeros((1, self.length), jnp.int32))["params"]}

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return conditioning_shapes(self)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        tokens, truncated = tokenize(self.tokenizer, captions, self.length, self.truncation)
        return {"tokens": tokens, "truncated": truncated}

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        text: Any = self.encoder.apply({"params": params["text_encoder"]}, features["tokens"])
        return (text,)


@dataclass(frozen=True)
class FrozenText:
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


@cache
def conditioning_shapes(text: TextConditioner) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of one caption's conditioning, of a conditioner that makes its own parameters; nothing is computed."""
    features = text.prepare([""])
    return jax.eval_shape(lambda key, given: text.encode(text.init(key), given), jax.random.key(0), features)


def check_truncation(truncation: str) -> None:
    """Raise `ValueError` for a setting that captions do not know."""
    known = get_args(CaptionTruncation)
    if truncation not in known:
        raise ValueError(f"truncation {truncation!r} of captions is none of {', '.join(known)}")


def tokenize(
    tokenizer: Any, captions: Sequence[str | None], length: int, truncation: CaptionTruncation
) -> tuple[Int[np.ndarray, "batch text"], Float[np.ndarray, "batch"]]:
    """Token ids padded to `length`, and 1 where a caption was cut. None reads as the empty caption."""
    texts = ["" if caption is None else caption for caption in captions]
    if not texts:
        return np.zeros((0, length), np.int32), np.zeros(0, np.float32)
    # Too long a caption is our business below, not a warning of the tokenizer's.
    sizes = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    for row, size in enumerate(sizes):
        if size > length and truncation == "error":
            raise RecordError(
                f"caption in row {row} has {size} tokens, more than the {length} of the text encoder: shorten "
                f"{texts[row]!r}, or cut captions with truncation='keep_start'"
            )
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return np.asarray(ids, np.int32), np.array([size > length for size in sizes], np.float32)
