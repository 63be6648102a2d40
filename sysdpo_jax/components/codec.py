"""Between images and latents: what a codec is, and the pixel-space one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.images import read_image
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Params


class Prepared(NamedTuple):
    """What a codec makes of images.

    Attributes:
        features: {"pixels" or "latents": array with a leading batch axis}.
        frames: For each image the frame it was cut from, see `Fitted`.
    """

    features: dict[str, np.ndarray]
    frames: Int[np.ndarray, "batch 6"]


@runtime_checkable
class Codec(Protocol):
    """Images (paths, bytes, PIL images, arrays) to features on the host, and latents of a denoiser back to [0, 1].

    image_shape and latent_shape are those of what is sampled.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    def prepare(self, images: Sequence[Any]) -> Prepared:
        """Turn images into features, on the host.

        Args:
            images: Paths, bytes, PIL images or arrays.

        Returns:
            {"latents": [B, h, w, c]} or, where those take a frozen model, {"pixels": ...}, and the frames.

        Raises:
            RecordError: For an image that cannot be used, naming the row.
        """
        ...

    def decode(
        self, params: Params, latents: Float[np.ndarray, "batch h w c"]
    ) -> Float[np.ndarray, "batch height width channels"]:
        """Turn latents into pixels, on the host.

        Args:
            params: Of the codec's model, {} where there is none.
            latents: As a denoiser makes them.

        Returns:
            Pixels in [0, 1].
        """
        ...


@runtime_checkable
class FrozenCodec(Codec, Protocol):
    """A codec whose model is the entry "codec" of the component's parameters, and is never trained.

    batch_size: images that the model takes at once. several_sizes: see `Component`. encode is jittable.
    """

    @property
    def batch_size(self) -> int: ...

    @property
    def several_sizes(self) -> bool: ...

    def init(self, key: PRNGKeyArray) -> Params: ...

    def encode(
        self, params: Params, pixels: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w c"]: ...


def whole_frames(codec: Codec, rows: int) -> Int[np.ndarray, "batch 6"]:
    """The frames of images that were made at the codec's size, uncut."""
    height, width, _ = codec.image_shape
    return np.tile(np.array([height, width, 0, 0, height, width], np.int32), (rows, 1))


def first_rows(values: Sequence[Any]) -> list[int]:
    """For each row the first one that holds the same object, as the intermediates of a record do their image."""
    first: dict[int, int] = {}
    return [first.setdefault(id(value), row) for row, value in enumerate(values)]


@dataclass(frozen=True)
class PixelCodec:
    """Latents are pixels in [-1, 1], blocks of patch x patch pixels folded into channels (space to depth).

    Args:
        image_shape: (height, width, channels) of the images.
        patch: Must divide height and width.

    Raises:
        ValueError: If it does not.
    """

    image_shape: tuple[int, int, int]
    patch: int = 1

    def __post_init__(self) -> None:
        hold_tuples(self)
        if self.image_shape[0] % self.patch or self.image_shape[1] % self.patch:
            raise ValueError(f"PixelCodec: patch {self.patch} must divide the image size {self.image_shape[:2]}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.image_shape
        return height // self.patch, width // self.patch, channels * self.patch**2

    def prepare(self, images: Sequence[Any]) -> Prepared:
        """Raises `RecordError` also for an image of another shape or with values outside [0, 1]."""
        pixels = np.zeros((len(images), *self.image_shape), np.float32)
        for row, first in enumerate(first_rows(images)):
            read = pixels[first] if first < row else read_image(images[row], row)
            if read.shape != self.image_shape:
                raise RecordError(f"image in row {row} has shape {read.shape}, expected {self.image_shape}")
            pixels[row] = read
        h, w, _ = self.latent_shape
        blocks = (2 * pixels - 1).reshape(-1, h, self.patch, w, self.patch, self.image_shape[2])
        latents = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.latent_shape)
        return Prepared({"latents": latents}, whole_frames(self, len(images)))

    def decode(
        self, params: Params, latents: Float[np.ndarray, "batch h w c"]
    ) -> Float[np.ndarray, "batch height width channels"]:
        """params: none, {}."""
        h, w, _ = self.latent_shape
        blocks = latents.reshape(-1, h, w, self.patch, self.patch, self.image_shape[2])
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)
