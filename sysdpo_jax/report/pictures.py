"""Pictures of several methods side by side, for the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from sysdpo_jax.report.markup import Markup, element, join
from sysdpo_jax.report.png import Pixels, data_uri, to_pixels

Tile = UInt8[np.ndarray, "_ _ 3"]

# Small pictures are enlarged by a whole factor to at least this many pixels a side.
SHOWN = 72
GAP = 4
METHOD_GAP = 24
WHITE = 255


@dataclass(frozen=True, eq=False)
class ImageSequence:
    """What one method made: pictures in [0, 1] and the caption of each. Raises ValueError if the numbers differ."""

    method: str
    images: Float[np.ndarray, "images height width 3"]
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(f"{self.method!r} has {len(self.images)} pictures and {len(self.captions)} captions")


@dataclass(frozen=True, eq=False)
class ImageRow:
    """What several methods made of the same prompt and seed."""

    prompt: str
    sequences: tuple[ImageSequence, ...]


def html_images(rows: Sequence[ImageRow]) -> Markup:
    """A block a prompt, in it a group a method, in it the pictures with their captions below."""
    return join(*(_html_row(row) for row in rows))


def html_picture(image: Float[np.ndarray, "height width 3"], alt: str) -> Markup:
    """An <img> that holds its picture, values in [0, 1]; small ones are enlarged."""
    height, width, _ = image.shape
    factor = _factor(width)
    return element("img", src=data_uri(to_pixels(image)), alt=alt, width=factor * width, height=factor * height)


def image_grid(rows: Sequence[ImageRow]) -> Pixels:
    """One picture of all: a line a prompt, methods from left to right with wider gaps between them, no text.

    Raises ValueError for no pictures, or pictures of several sizes.
    """
    lines = [[[to_pixels(image) for image in s.images] for s in row.sequences if len(s.images)] for row in rows]
    shapes = {image.shape for line in lines for sequence in line for image in sequence}
    if len(shapes) != 1:
        raise ValueError(f"a grid needs pictures of one size, got {sorted(shapes) or 'none'}")
    factor = _factor(shapes.pop()[1])
    groups = [[_beside([_enlarge(image, factor) for image in s], GAP) for s in line] for line in lines if line]
    drawn = [_beside(line, METHOD_GAP) for line in groups]
    width = max(line.shape[1] for line in drawn)
    padded = [np.pad(line, ((0, GAP), (0, width - line.shape[1]), (0, 0)), constant_values=WHITE) for line in drawn]
    return np.concatenate(padded)[:-GAP]


def _html_row(row: ImageRow) -> Markup:
    groups = [
        element(
            "div",
            element("h4", sequence.method),
            element("div", *map(_html_picture, sequence.images, sequence.captions), class_="sequence"),
        )
        for sequence in row.sequences
    ]
    return element("section", element("h3", row.prompt), element("div", *groups, class_="methods"), class_="prompt")


def _html_picture(image: Float[np.ndarray, "height width 3"], caption: str) -> Markup:
    return element("figure", html_picture(image, caption), element("figcaption", caption))


def _factor(width: int) -> int:
    return -(-SHOWN // width)


def _enlarge(pixels: Tile, factor: int) -> Tile:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _beside(pictures: Sequence[Tile], gap: int) -> Tile:
    """From left to right."""
    spaced = [np.pad(picture, ((0, 0), (0, gap), (0, 0)), constant_values=WHITE) for picture in pictures]
    return np.concatenate(spaced, axis=1)[:, :-gap]
