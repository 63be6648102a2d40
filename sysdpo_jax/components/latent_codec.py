"""Latents of a frozen autoencoder."""

from collections.abc import Callable, Sequence
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
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class LatentCodec:
    """The means of an AutoencoderKL, shifted and scaled as the denoiser expects them.

    params: the autoencoder's, frozen; they are not part of what is trained. image_size: (height, width); images of
    another size are resized to cover it and their middle is cut out, the same way for both sides of a pair.
    batch_size: images that are handled at once; the autoencoder's attention takes a gigabyte for one of 1024 x 1024.
    Departure from the training code of latent diffusion: the posterior's mean stands for a draw, so that encoding is a
    function of the image.
    """

    autoencoder: AutoencoderKL
    params: Params = field(compare=False, repr=False)
    image_size: tuple[int, int] = (512, 512)
    batch_size: int = 1

    def __post_init__(self) -> None:
        hold_tuples(self)
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
        frames = np.zeros((len(images), 6), np.int32)

        def pixels(start: int, stop: int) -> np.ndarray:
            fitted = [fit_image(images[row], *self.image_size, row) for row in range(start, stop)]
            frames[start:stop] = [f.frame for f in fitted]
            return 2 * np.stack([f.pixels for f in fitted]) - 1

        encode = partial(_encode, self.autoencoder, self.params)
        return Encoded(self._in_batches(encode, pixels, len(images), self.latent_shape), frames)

    def decode(self, latents: Float[np.ndarray, "batch h w c"]) -> Float[np.ndarray, "batch height width channels"]:
        decode = partial(_decode, self.autoencoder, self.params)
        pixels = self._in_batches(decode, lambda start, stop: latents[start:stop], len(latents), self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)

    def _in_batches(
        self, function: Callable[[np.ndarray], Array], rows: Callable[[int, int], np.ndarray], count: int, shape: Any
    ) -> np.ndarray:
        """`function` of the rows, batch by batch in one compiled size; a row of the result has `shape`."""
        made, size = np.zeros((count, *shape), np.float32), self.batch_size
        for start in range(0, count, size):
            part = rows(start, min(start + size, count))
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
