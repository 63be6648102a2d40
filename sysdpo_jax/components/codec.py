"""Between images and latents: what a codec is, the pixel-space one, and that of a frozen autoencoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.encoding import in_slices
from sysdpo_jax.components.images import fit_image, open_picture, read_image
from sysdpo_jax.models.autoencoder import AutoencoderKL, scale_latents, unscale_latents
from sysdpo_jax.models.initial import fresh_params
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Params

Latents = Float[Array, "batch h w c"]
Pixels = Float[np.ndarray, "batch height width channels"]


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
            {"latents": [B, h, w, c]} or, of a `LatentCodec`, {"pixels": ...}, and the frames.

        Raises:
            RecordError: For an image that cannot be used, naming the row.
        """
        ...

    def decode(self, params: Params, latents: Float[np.ndarray, "batch h w c"]) -> Pixels:
        """Turn latents into pixels, on the host.

        Args:
            params: Of the codec's model, {} where there is none.
            latents: As a denoiser makes them.

        Returns:
            Pixels in [0, 1].
        """
        ...


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

    def decode(self, params: Params, latents: Float[np.ndarray, "batch h w c"]) -> Pixels:
        """params: none, {}."""
        h, w, _ = self.latent_shape
        blocks = latents.reshape(-1, h, w, self.patch, self.patch, self.image_shape[2])
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_shape)
        return np.clip((pixels + 1) / 2, 0, 1)


@dataclass(frozen=True)
class LatentCodec:
    """The means of an AutoencoderKL, shifted and scaled as the denoiser expects them.

    The model is the entry "codec" of the component's parameters, and is never trained.
    Pixels are rounded to 8 bits, as in a file, so that a picture that was sampled and the file of it are the same.
    Departure from the training code of latent diffusion: the posterior's mean stands for a draw, so that encoding is a
    function of the image.

    Args:
        autoencoder: The frozen model.
        sizes: (height, width) pairs. The images of one call of `prepare` all get the one whose aspect ratio is nearest
            to theirs: to the mean of its logarithm. They are resized to cover it and their middle is cut out. What is
            sampled has the first size.
        batch_size: Images that are handled at once; the autoencoder's attention takes a gigabyte for one of 1024 x
            1024.

    Raises:
        ValueError: If there is no size, or one that the autoencoder's factor does not divide.
    """

    autoencoder: AutoencoderKL
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)
    batch_size: int = 1

    def __post_init__(self) -> None:
        hold_tuples(self)
        if not self.sizes:
            raise ValueError("LatentCodec: sizes is empty: give at least one (height, width)")
        for size in self.sizes:
            if not isinstance(size, tuple) or len(size) != 2 or any(side < 1 or side % self._factor for side in size):
                raise ValueError(
                    f"LatentCodec: size {size} must be a (height, width) of which {self._factor} divides both"
                )

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def several_sizes(self) -> bool:
        return len(self.sizes) > 1

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what is sampled."""
        return self.sizes[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, 3)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = self.sizes[0]
        return height // self._factor, width // self._factor, self.autoencoder.config.latent_channels

    def init(self, key: PRNGKeyArray) -> Params:
        """Make fresh parameters of the autoencoder; they do not depend on the sizes.

        Args:
            key: Of the draws.

        Returns:
            The autoencoder's tree.
        """
        config = self.autoencoder.config
        side = 2 * self._factor
        return fresh_params(
            self.autoencoder, key, jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
        )

    def prepare(self, images: Sequence[Any]) -> Prepared:
        """Pixels in 8 bits, at one of the sizes."""
        firsts = first_rows(images)
        if self.several_sizes:
            # Opened once, for their shapes and for their pixels.
            distinct = dict.fromkeys(firsts)
            opened: dict[int, Any] = {row: open_picture(images[row], f"image in row {row}") for row in distinct}
            height, width = self._nearest([opened[first].shape[:2] for first in firsts])
        else:
            opened, (height, width) = dict(enumerate(images)), self.sizes[0]
        pixels, frames = np.zeros((len(images), height, width, 3), np.uint8), np.zeros((len(images), 6), np.int32)
        for row, first in enumerate(firsts):
            if first < row:
                pixels[row], frames[row] = pixels[first], frames[first]
            else:
                fitted = fit_image(opened[row], height, width, row)
                pixels[row], frames[row] = np.rint(255 * fitted.pixels), fitted.frame
        return Prepared({"pixels": pixels}, frames)

    def encode(self, params: Params, pixels: UInt8[Array, "batch height width 3"]) -> Latents:
        """The latents of pixels. Jittable.

        Args:
            params: The autoencoder's tree.
            pixels: In 8 bits.

        Returns:
            Shifted and scaled latents.
        """
        scaled = 2 * (pixels.astype(jnp.float32) / 255) - 1
        mean: Any = self.autoencoder.apply({"params": params}, scaled, method="encode")[0]
        return scale_latents(self.autoencoder.config, mean).astype(jnp.float32)

    def decode(self, params: Params, latents: Float[np.ndarray, "batch h w c"]) -> Pixels:
        """Pixels in [0, 1], on the host, batch_size images at a time."""
        decode = partial(_decode, self.autoencoder, params)
        pixels = in_slices(decode, latents, range(len(latents)), self.batch_size)
        return np.clip((pixels + 1) / 2, 0, 1)

    def _nearest(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The size for images of these heights and widths; of equally near ones the first."""
        ratio = float(np.mean([math.log(h / w) for h, w in shapes])) if shapes else 0.0
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def bucket_sizes(side: int, step: int = 64, ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """The `sizes` of a `LatentCodec` that takes pictures of several aspect ratios.

    Args:
        side: The pixels of a picture are at most side x side.
        step: Heights and widths are multiples of it.
        ratio: Of the longer side to the shorter one, at most. With side 1024 and ratio 4 the sizes are the largest
            widths of each height in the table of SDXL (arXiv 2307.01952, appendix I).

    Returns:
        (height, width) pairs, the square first.
    """
    heights = range(step, side * side // step + 1, step)
    sizes = [(height, side * side // height // step * step) for height in heights]
    kept = [(h, w) for h, w in sizes if w and max(h / w, w / h) <= ratio]
    return tuple(sorted(kept, key=lambda size: abs(math.log(size[0] / size[1]))))


@partial(jax.jit, static_argnums=0)
def _decode(autoencoder: AutoencoderKL, params: Params, latents: Latents) -> Float[Array, "batch height width 3"]:
    made: Any = autoencoder.apply({"params": params}, unscale_latents(autoencoder.config, latents), method="decode")
    return made.astype(jnp.float32)
