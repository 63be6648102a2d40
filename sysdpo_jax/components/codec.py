"""Between images and latents, on the host, once: `Codec` and the pixel-space one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.images import read_image
from sysdpo_jax.static import hold_tuples


class Encoded(NamedTuple):
    """Latents, and for each image the frame it was cut from, see `images.Fitted`."""

    latents: Float[np.ndarray, "batch h w c"]
    frames: Int[np.ndarray, "batch 6"]


@runtime_checkable
class Codec(Protocol):
    """Encodes images (paths, bytes, PIL images, arrays) as latents that a denoiser works on, and back to [0, 1]."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    def encode(self, images: Sequence[Any]) -> Encoded: ...

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]: ...


def whole_frames(codec: Codec, rows: int) -> Int[np.ndarray, "batch 6"]:
    """The frames of images that were made at the codec's size, uncut."""
    height, width, _ = codec.image_shape
    return np.tile(np.array([height, width, 0, 0, height, width], np.int32), (rows, 1))


@dataclass(frozen=True)
class PixelCodec:
    """Latents are pixels in [-1, 1], blocks of patch x patch pixels folded into channels (space to depth).

    image_shape: (height, width, channels) of the images; patch must divide height and width.
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

    def encode(self, images: Sequence[Any]) -> Encoded:
        """Raises `RecordError` for an image that cannot be read, of another shape or with values outside [0, 1]."""
        pixels = np.zeros((len(images), *self.image_shape), np.float32)
        for row, image in enumerate(images):
            read = read_image(image, row)
            if read.shape != self.image_shape:
                raise RecordError(f"image in row {row} has shape {read.shape}, expected {self.image_shape}")
            pixels[row] = read
        h, w, _ = self.latent_shape
        blocks = (2 * pixels - 1).reshape(-1, h, self.patch, w, self.patch, self.image_shape[2])
        latents = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.latent_shape)
        return Encoded(latents, whole_frames(self, len(images)))

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]:
        h, w, _ = self.latent_shape
        blocks = latents.reshape(-1, h, w, self.patch, self.patch, self.image_shape[2])
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)
