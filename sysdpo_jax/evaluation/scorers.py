"""Scorers that measure attributes in the pixels of a picture of one object on a plain background.

The background colour is the median of the border pixels. A pixel's distance from it (largest over the channels) as a
share of the object's is how much of the pixel the object covers. The mask stretches that share about 1/2, so that the
faint noise of a generated background counts nothing and the area of an anti-aliased edge stays what it is on average.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Images = Float[np.ndarray, "batch height width 3"]
Scores = Float[np.ndarray, "batch"]

# A picture whose largest distance from its background is below this shows nothing.
VISIBLE = 0.02
# A pixel that is covered less than this is background, one that is covered more than 1 less this is all foreground.
NOISE = 0.2
# The object's distance is the mean over this many most distant pixels: steadier than the largest alone.
BRIGHTEST = 4


def brightness(images: Images) -> Scores:
    """How bright the foreground is.

    Args:
        images: In [0, 1].

    Returns:
        The mean of its three channels; 0 for an empty picture.
    """
    return _colour(images).mean(axis=-1)


def size(images: Images) -> Scores:
    """How much of the picture the foreground covers.

    Args:
        images: In [0, 1].

    Returns:
        A share; 0 for an empty picture.
    """
    return foreground(images).mean(axis=(1, 2))


def redness(images: Images) -> Scores:
    """How red the foreground's colour is.

    Args:
        images: In [0, 1].

    Returns:
        Red as a share of red and blue; 1/2 for an empty picture.
    """
    red, _, blue = np.moveaxis(_colour(images), -1, 0)
    total = red + blue
    return np.where(total > 0, red / np.where(total > 0, total, 1), 0.5)


def height(images: Images) -> Scores:
    """Where the foreground's centre of mass is.

    Args:
        images: In [0, 1].

    Returns:
        0 at the bottom edge, 1 at the top; 1/2 for an empty picture.
    """
    mask = foreground(images)
    rows = images.shape[1]
    heights = 1 - (np.arange(rows) + 0.5) / rows
    mass = mask.sum(axis=(1, 2))
    moment = (mask * heights[None, :, None]).sum(axis=(1, 2))
    return np.where(mass > 0, moment / np.where(mass > 0, mass, 1), 0.5)


@dataclass(frozen=True)
class CalibratedScorer:
    """A measure on a scale of its own, a line through two values. Scores are not clipped.

    Args:
        measure: Of pictures.
        low: What it gives where the score is 0.
        high: What it gives where the score is 1.

    Raises:
        ValueError: When these are the same.
    """

    measure: Callable[[Images], Scores]
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low == self.high:
            raise ValueError(
                f"a scale needs two ends: the measure is {self.low} at both, so it does not see the change"
            )

    def __call__(self, images: Images) -> Scores:
        """Score pictures.

        Args:
            images: In [0, 1].

        Returns:
            A score for each.
        """
        return (self.measure(images) - self.low) / (self.high - self.low)


def foreground(images: Images) -> Float[np.ndarray, "batch height width"]:
    """How much of each pixel is foreground.

    Args:
        images: In [0, 1].

    Returns:
        0 to 1; all 0 where nothing is visible.
    """
    border = np.concatenate([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1)
    background = np.median(border, axis=1)[:, None, None, :]
    distance = np.abs(images.astype(np.float64) - background).max(axis=-1)
    full = np.sort(distance.reshape(len(images), -1), axis=1)[:, -BRIGHTEST:].mean(axis=1)[:, None, None]
    cover = np.where(full > VISIBLE, distance / np.where(full > VISIBLE, full, 1), 0)
    return np.clip((cover - NOISE) / (1 - 2 * NOISE), 0, 1)


def _colour(images: Images) -> Float[np.ndarray, "batch 3"]:
    """Mean colour of the foreground; pixels at the edge, which mix with the background, count little."""
    weight = foreground(images)[..., None] ** 4
    mass = weight.sum(axis=(1, 2))
    return (images * weight).sum(axis=(1, 2)) / np.where(mass > 0, mass, 1)
