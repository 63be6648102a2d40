"""Latents of a frozen autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sysdpo_jax.components.codec import Encoded
from sysdpo_jax.components.images import fit_image
from sysdpo_jax.models.autoencoder import AutoencoderKL, scale_latents, unscale_latents
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class LatentCodec:
    """The means of an AutoencoderKL, shifted and scaled as the denoiser expects them.

    params: the autoencoder's, frozen; they are not part of what is trained. image_size: (height, width); images of
    another size are resized to cover it and their middle is cut out, the same way for both sides of a pair.
    batch_size: images that the autoencoder handles at once. Departure from the training code of latent diffusion: the
    posterior's mean stands for a draw, so that encoding is a function of the image.
    """

    autoencoder: AutoencoderKL
    params: Params = field(compare=False, repr=False)
    image_size: tuple[int, int] = (512, 512)
    batch_size: int = 4

    def __post_init__(self) -> None:
        if any(size % self._factor for size in self.image_size):
            raise ValueError(f"LatentCodec: image_size {self.image_size} must be divisible by {self._factor}")

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, 3)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = self.image_size
        return height // self._factor, width // self._factor, self.autoencoder.config.latent_channels

    def encode(self, images: Sequence[Any]) -> Encoded:
        """Raises `RecordError` for an image that cannot be read."""
        fitted = [fit_image(image, *self.image_size, row) for row, image in enumerate(images)]
        pixels = np.stack([f.pixels for f in fitted]) if fitted else np.zeros((0, *self.image_shape), np.float32)
        frames = np.array([f.frame for f in fitted], np.int32).reshape(-1, 6)
        encode = partial(_encode, self.autoencoder, self.params)
        return Encoded(in_batches(encode, 2 * pixels - 1, self.batch_size, self.latent_shape), frames)

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]:
        decode = partial(_decode, self.autoencoder, self.params)
        pixels = in_batches(decode, latents, self.batch_size, self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)


def in_batches(function: Any, rows: np.ndarray, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """`function` of the rows, `size` at a time in one compiled shape; each row of the result has `shape`."""
    made = np.zeros((len(rows), *shape), np.float32)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        made[start : start + size] = np.asarray(function(padded))[: len(part)]
    return made


@partial(jax.jit, static_argnums=0)
def _encode(
    autoencoder: AutoencoderKL, params: Params, pixels: Float[Array, "batch height width 3"]
) -> Float[Array, "batch h w c"]:
    mean: Any = autoencoder.apply({"params": params}, pixels, method="encode")[0]
    return scale_latents(autoencoder.config, mean).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _decode(
    autoencoder: AutoencoderKL, params: Params, latents: Float[Array, "batch h w c"]
) -> Float[Array, "batch height width 3"]:
    made: Any = autoencoder.apply({"params": params}, unscale_latents(autoencoder.config, latents), method="decode")
    return made.astype(jnp.float32)
