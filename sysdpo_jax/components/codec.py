"""Between images and latents, on the host, once: `Codec` and the pixel-space one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from sysdpo_jax.components.base import RecordError


@runtime_checkable
class Codec(Protocol):
    """Encodes images (values in [0, 1]) as latents that a denoiser works on, and back."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    def encode(self, images: Sequence[Any]) -> Float[np.ndarray, "batch h w c"]: ...

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]: ...


@dataclass(frozen=True)
class PixelCodec:
    """Latents are pixels in [-1, 1], blocks of patch x patch pixels folded into channels (space to depth).

    image_shape: (height, width, channels) of the images; patch must divide height and width.
    """

    image_shape: tuple[int, int, int]
    patch: int = 1

    def __post_init__(self) -> None:
        if self.image_shape[0] % self.patch or self.image_shape[1] % self.patch:
            raise ValueError(f"PixelCodec: patch {self.patch} must divide the image size {self.image_shape[:2]}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.image_shape
        return height // self.patch, width // self.patch, channels * self.patch**2

    def encode(self, images: Sequence[Any]) -> Float[np.ndarray, "batch h w c"]:
        """Raises `RecordError` for an image of another shape or with values outside [0, 1]."""
        for row, image in enumerate(images):
            if np.shape(image) != self.image_shape:
                raise RecordError(f"image in row {row} has shape {np.shape(image)}, expected {self.image_shape}")
        pixels = np.asarray(images, np.float32).reshape(len(images), *self.image_shape)
        bad = ~((pixels >= 0) & (pixels <= 1)).reshape(len(images), -1).all(axis=1)
        if bad.any():
            raise RecordError(f"image in row {int(np.argmax(bad))} has values outside [0, 1]: scale it before")
        h, w, _ = self.latent_shape
        blocks = (2 * pixels - 1).reshape(-1, h, self.patch, w, self.patch, self.image_shape[2])
        return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.latent_shape)

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]:
        h, w, _ = self.latent_shape
        blocks = latents.reshape(-1, h, w, self.patch, self.patch, self.image_shape[2])
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)
