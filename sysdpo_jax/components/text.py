"""What a denoiser is told about its caption: conditioners, trained with the denoiser or frozen and run once.

Axes: B batch, S text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
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
    """Captions -> the arrays that a denoiser takes after the time, in two steps: host side, then jittable."""

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """Fresh parameters of what is trained of it, by name; they join the denoiser's."""
        ...

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Those of the conditioning of one caption."""
        ...

    def prepare(self, captions: Sequence[str | None], frames: Int[np.ndarray, "batch 6"]) -> dict[str, Features]:
        """NumPy features with a leading batch axis; "truncated" [B] is 1 where a caption was cut.

        None stands for the null condition of guidance. frames: see `codec.Encoded`.
        Raises `RecordError` for a caption that is too long when such captions are not cut.
        """
        ...

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        """The denoiser's conditioning, each array with a leading batch axis. Jittable."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    """One module, token ids [B, S] -> [B, S, D], trained as "text_encoder": Stable Diffusion 1 and 2, small systems.

    tokenizer: Hugging Face tokenizer with a padding token; captions are padded to length tokens. truncation: "error"
    refuses a longer caption, "keep_start" cuts it as diffusers does.
    """

    encoder: nn.Module
    tokenizer: Any = field(compare=False, repr=False)
    length: int = 77
    truncation: CaptionTruncation = "error"

    def __post_init__(self) -> None:
        check_truncation(self.truncation)

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        return {"text_encoder": self.encoder.init(key, jnp.zeros((1, self.length), jnp.int32))["params"]}

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return conditioning_shapes(self)

    def prepare(self, captions: Sequence[str | None], frames: Int[np.ndarray, "batch 6"]) -> dict[str, Features]:
        tokens, truncated = tokenize(self.tokenizer, captions, self.length, self.truncation)
        return {"tokens": tokens, "truncated": truncated}

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        text: Any = self.encoder.apply({"params": params["text_encoder"]}, features["tokens"])
        return (text,)


@dataclass(frozen=True)
class FrozenText:
    """A conditioner whose parameters are not trained: it runs in `prepare`, once, and never in the step.

    params: the conditioner's. batch_size: captions that it handles at once. Equal captions are encoded once.
    """

    text: TextConditioner
    params: Params = field(compare=False, repr=False)
    batch_size: int = 16

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        return {}

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.text.shapes()

    def prepare(self, captions: Sequence[str | None], frames: Int[np.ndarray, "batch 6"]) -> dict[str, Features]:
        features = self.text.prepare(captions, frames)
        first, inverse = _distinct(features, len(captions))
        encoded = tuple(np.zeros((len(first), *shape.shape[1:]), shape.dtype) for shape in self.shapes())
        for start in range(0, len(first), self.batch_size):
            rows = first[start : start + self.batch_size]
            # Padded with its last row to a power of two, so that few shapes are compiled.
            places = rows + rows[-1:] * (min(2 ** (len(rows) - 1).bit_length(), self.batch_size) - len(rows))
            part = _encode(self.text, self.params, jax.tree.map(lambda x, i=places: x[i], features))
            for whole, made in zip(encoded, part, strict=True):
                whole[start : start + len(rows)] = np.asarray(made)[: len(rows)]
        # One row for all, as the null condition is, stays one row in memory.
        spread = lambda x: np.broadcast_to(x, (len(inverse), *x.shape[1:])) if len(first) == 1 else x[inverse]  # noqa: E731
        return {"encoded": jax.tree.map(spread, encoded), "truncated": features["truncated"]}

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        return tuple(features["encoded"])


def _distinct(features: dict[str, Features], rows: int) -> tuple[list[int], Int[np.ndarray, "batch"]]:
    """The first row of each kind, and the kind of every row."""
    leaves = jax.tree.leaves(features)
    kinds: dict[bytes, int] = {}
    first: list[int] = []
    inverse = np.zeros(rows, np.int64)
    for row in range(rows):
        inverse[row] = kinds.setdefault(b"".join(leaf[row].tobytes() for leaf in leaves), len(first))
        if inverse[row] == len(first):
            first.append(row)
    return first, inverse


@cache
def conditioning_shapes(text: TextConditioner) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of one caption's conditioning, of a conditioner that makes its own parameters; nothing is computed."""
    features = text.prepare([""], np.zeros((1, 6), np.int32))
    return jax.eval_shape(lambda key, given: text.encode(text.init(key), given), jax.random.key(0), features)


@partial(jax.jit, static_argnums=0)
def _encode(text: TextConditioner, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
    return text.encode(params, features)


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
