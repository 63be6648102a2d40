"""Pictures of several methods side by side, for the same prompts and seeds."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Pixels = Float[np.ndarray, "height width 3"]

# Small pictures are enlarged by a whole factor to at least this many pixels a side.
SHOWN = 72
GAP = 4
METHOD_GAP = 24


@dataclass(frozen=True, eq=False)
class ImageSequence:
    """What one method made.

    Args:
        method: Its name.
        images: Pictures in [0, 1].
        captions: One a picture.

    Raises:
        ValueError: If the numbers differ.
    """

    method: str
    images: Float[np.ndarray, "images height width 3"]
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(f"{self.method!r} has {len(self.images)} pictures and {len(self.captions)} captions")


@dataclass(frozen=True, eq=False)
class ImageRow:
    """What several methods made of the same prompt and seed.

    Args:
        prompt: Of the row.
        sequences: One a method.
    """

    prompt: str
    sequences: tuple[ImageSequence, ...]


class Picture(NamedTuple):
    """A picture that needs no other file, and the size at which it is shown."""

    uri: str
    width: int
    height: int


def to_image(values: Pixels) -> Image.Image:
    """Round values to the nearest of 256 levels.

    Args:
        values: In [0, 1]; others are clipped.

    Returns:
        The picture.

    Raises:
        ValueError: For values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a picture holds values that are not finite: look for the step that made them")
    return Image.fromarray(np.rint(np.clip(values.astype(np.float64), 0, 1) * 255).astype(np.uint8))


def picture(values: Pixels) -> Picture:
    """As a PNG file in a data: URI."""
    file, image = io.BytesIO(), to_image(values)
    image.save(file, "PNG", optimize=True)
    factor = _factor(image)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(uri, factor * image.width, factor * image.height)


def image_grid(rows: Sequence[ImageRow]) -> Image.Image:
    """One picture of all: a line a prompt, methods from left to right with wider gaps between them, no text.

    Args:
        rows: One a prompt.

    Returns:
        The picture.

    Raises:
        ValueError: For no pictures, or pictures of several sizes.
    """
    lines = [[[to_image(values) for values in s.images] for s in row.sequences if len(s.images)] for row in rows]
    lines = [line for line in lines if line]
    sizes = {image.size for line in lines for images in line for image in images}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs pictures of one size, got {sorted(sizes) or 'none'}")
    factor = _factor(lines[0][0][0])

    def enlarged(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        return _padded(np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1), GAP, GAP)

    methods = [[np.concatenate([*map(enlarged, images)], axis=1) for images in line] for line in lines]
    drawn = [np.concatenate([_padded(method, 0, METHOD_GAP - GAP) for method in line], axis=1) for line in methods]
    width = max(line.shape[1] for line in drawn)
    grid = np.concatenate([_padded(line, 0, width - line.shape[1]) for line in drawn])
    return Image.fromarray(grid[:-GAP, :-METHOD_GAP])


def _padded(pixels: UInt8[np.ndarray, "h w 3"], below: int, right: int) -> UInt8[np.ndarray, "height width 3"]:
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), constant_values=255)


def _factor(image: Image.Image) -> int:
    return -(-SHOWN // image.width)
