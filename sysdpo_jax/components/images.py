"""Images as users have them (paths, bytes, PIL images, arrays) -> RGB pixels in [0, 1] of one size."""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError

from sysdpo_jax.components.base import RecordError


class Fitted(NamedTuple):
    """An image of the wanted size, and how it was cut out of the original.

    frame: (original height, width, top and left of the crop after resizing, height, width), as SDXL is conditioned on
    (arXiv 2307.01952, section 2.2).
    """

    pixels: Float[np.ndarray, "height width 3"]
    frame: tuple[int, int, int, int, int, int]


def read_image(value: Any, row: int) -> Float[np.ndarray, "height width channels"]:
    """Pixels in [0, 1]. A picture is turned as its EXIF says; palettes and grey become RGB, transparency is dropped.

    value: a path, the bytes of an image file, a PIL image, or an array [height, width, channels] of uint8 or of floats
    in [0, 1]. row: its place, for errors. Raises `RecordError` for what cannot be read or lies outside [0, 1].
    """
    if isinstance(value, str | Path | bytes):
        return _decode(value, row)
    if isinstance(value, Image.Image):
        return _pixels(value, row)
    array = np.asarray(value)
    if array.ndim != 3 or array.dtype.kind not in "fu":
        raise RecordError(
            f"image in row {row} is {type(value).__name__} of shape {np.shape(value)} and type {array.dtype}: give a "
            "path, bytes, a PIL image or an array [height, width, channels] of uint8 or of floats in [0, 1]"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    return _checked(array.astype(np.float32), row)


def fit_image(value: Any, height: int, width: int, row: int) -> Fitted:
    """The image resized so that it covers height x width, its middle cut out; unchanged where it has that size."""
    pixels = read_image(value, row)
    if pixels.shape[2] != 3:
        raise RecordError(f"image in row {row} has {pixels.shape[2]} channels, expected 3 (RGB)")
    old_height, old_width = pixels.shape[:2]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = math.ceil(old_height * scale - 1e-6), math.ceil(old_width * scale - 1e-6)
    if (new_height, new_width) != (old_height, old_width):
        pixels = np.stack(
            [
                np.asarray(Image.fromarray(channel).resize((new_width, new_height), Image.Resampling.BICUBIC))
                for channel in np.moveaxis(pixels, 2, 0)
            ],
            axis=2,
        ).clip(0, 1)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    frame = (old_height, old_width, top, left, height, width)
    return Fitted(pixels[top : top + height, left : left + width], frame)


def _decode(value: str | Path | bytes, row: int) -> Float[np.ndarray, "height width 3"]:
    what = "its bytes" if isinstance(value, bytes) else repr(str(value))
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as opened:
            return _pixels(opened, row)
    except FileNotFoundError:
        raise RecordError(f"image in row {row}: there is no file {what}") from None
    except RecordError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RecordError(
            f"image in row {row} cannot be read from {what} ({error}): replace it or drop the row"
        ) from None


def _pixels(image: Image.Image, row: int) -> Float[np.ndarray, "height width 3"]:
    upright = ImageOps.exif_transpose(image)
    # Pillow would cut these off at 255 instead of scaling them.
    if upright.mode.startswith("I"):
        return np.repeat(_checked(np.asarray(upright, np.float32)[..., None] / 65535, row), 3, axis=2)
    if upright.mode == "F":
        return np.repeat(_checked(np.asarray(upright)[..., None], row), 3, axis=2)
    return np.asarray(upright.convert("RGB"), np.float32) / 255


def _checked(pixels: np.ndarray, row: int) -> np.ndarray:
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise RecordError(f"image in row {row} has values outside [0, 1]: scale it before")
    return pixels
