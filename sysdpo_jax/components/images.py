"""Images as users have them (paths, bytes, PIL images, arrays) -> RGB pixels in [0, 1] of one size.

Whatever opens an image opens it here: it is turned as its EXIF says once, and what Pillow stumbles over is a
`RecordError`. Axes: H height, W width.
"""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps

from sysdpo_jax.components.base import RecordError

Pixels = UInt8[np.ndarray, "h w channels"] | Float[np.ndarray, "h w channels"]


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
    in [0, 1]. row: its place, for errors. Raises `RecordError` for what cannot be read, lies outside [0, 1], or is
    several pictures.
    """
    return _floats(open_picture(value, f"image in row {row}"))


def fit_image(value: Any, height: int, width: int, row: int) -> Fitted:
    """The image resized so that it covers height x width, its middle cut out; unchanged where it has that size.

    Only what is cut out is resized: what that costs depends on the result, whatever the shape of the image.
    """
    pixels = open_picture(value, f"image in row {row}")
    old_height, old_width, channels = pixels.shape
    if channels != 3:
        raise RecordError(f"image in row {row} has {channels} channels, expected 3 (RGB)")
    scale = max(height / old_height, width / old_width)
    new_height, new_width = math.ceil(old_height * scale - 1e-6), math.ceil(old_width * scale - 1e-6)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    # Where what is cut out lies before, in which it must stay whatever is rounded.
    rows, columns = old_height / new_height, old_width / new_width
    right, bottom = min((left + width) * columns, old_width), min((top + height) * rows, old_height)
    box = left * columns, top * rows, right, bottom
    # Channel by channel, for Pillow resizes RGB in 8 bits alone, and rounds between its two passes.
    resized = [
        np.asarray(Image.fromarray(_floats(channel)).resize((width, height), Image.Resampling.BICUBIC, box))
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    frame = (old_height, old_width, top, left, height, width)
    return Fitted(np.stack(resized, axis=2).clip(0, 1), frame)


def open_picture(value: Any, where: str) -> Pixels:
    """The upright picture: bytes, or floats in [0, 1]. where: names it, for errors. Raises as `read_image`."""
    if not isinstance(value, str | Path | bytes | Image.Image):
        return _array(value, where)
    what = f"{len(value)} bytes" if isinstance(value, bytes) else repr(str(value))
    try:
        if isinstance(value, Image.Image):
            return _picture(value, where)
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as opened:
            _check_size(opened, where)
            return _picture(opened, where)
    except FileNotFoundError:
        raise RecordError(f"{where}: there is no file {what}; paths begin at the folder of the data") from None
    except RecordError:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file leads them into: struct.error, IndexError, zlib.error ...
        said = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(f"{where}: {what} cannot be read ({said}): replace it, or drop the row") from None


def _check_size(image: Image.Image, where: str) -> None:
    """Refuses what Pillow warns of; it refuses twice as much itself."""
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise RecordError(
            f"{where} has {image.width} x {image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that Pillow "
            "takes for safe: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


def _picture(image: Image.Image, where: str) -> Pixels:
    # The second picture of an MPO file, as telephones write it, is a preview or a depth of the first.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RecordError(f"{where} is {image.n_frames} pictures in one file: give one of them")  # type: ignore[attr-defined]
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    # Pillow would cut these off at 255 instead of scaling them.
    if image.mode.startswith("I"):
        return np.repeat(_checked(np.asarray(image, np.float32)[..., None] / 65535, where), 3, axis=2)
    if image.mode == "F":
        return np.repeat(_checked(np.asarray(image)[..., None], where), 3, axis=2)
    if image.mode in ("P", "PA"):
        # A palette may have transparent colours, which Pillow wants to see kept before they are dropped.
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _array(value: Any, where: str) -> Pixels:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RecordError(f"{where} is {type(value).__name__}, which is no array ({error}): give an image") from None
    if array.ndim != 3 or array.dtype.kind not in "fu" or not array.size:
        raise RecordError(
            f"{where} is {type(value).__name__} of shape {array.shape} and type {array.dtype}: give a "
            "path, bytes, a PIL image or an array [height, width, channels] of uint8 or of floats in [0, 1]"
        )
    return array if array.dtype == np.uint8 else _checked(array.astype(np.float32), where)


def _checked(pixels: np.ndarray, where: str) -> np.ndarray:
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise RecordError(f"{where} has values outside [0, 1]: scale it before")
    return pixels


def _floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels


def as_png(image: Any, name: str) -> bytes:
    """The bytes of an image as PNG, or those that it is. name: for errors."""
    if isinstance(image, bytes):
        return image
    pixels = open_picture(image, name)
    # Whatever its mode was, Pillow writes red, green and blue.
    whole = pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)
    picture = Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
