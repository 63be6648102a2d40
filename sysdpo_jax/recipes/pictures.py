"""The program of sysdpo_jax/recipes/pictures.yaml: a language model writes the prompt of a painter, wishes are met.

    wish -> prompt (language model) -> picture (Stable Diffusion)

Nothing here knows of the alignment: how the writer is asked, what the wishes are about (shapes in three respects), and
what a picture shows. docs/programs/pictures.md leads through it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

# What the program has, and what the scripts that make a painter for it and its figures read.
__all__ = ["COLOURS", "RADII", "SIDE", "Kind", "drawn", "kinds", "request", "right", "score", "shown", "wanted"]

EXAMPLES = (
    ("user", "My bathroom needs a picture of the sea."),
    ("assistant", "a calm blue sea"),
    ("user", "I would like a cat for my grandmother."),
    ("assistant", "a small black cat"),
)
# Pixels of a side; points of a pixel's side at which a shape is looked up.
SIDE, FINE = 16, 4
BACKGROUND = (1.0, 1.0, 1.0)
RADII = {"small": 3.5, "large": 7.0}
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.3, 0.9), "yellow": (1.0, 0.85, 0.1)}
# At radius 1, y upwards.
SHAPES = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1,
    "triangle": lambda x, y: (y > -1) & (abs(x) < (1 - y) / 2),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
}
# The words of wishes, and what they ask for.
WORDS = {
    **{word: word for word in (*RADII, *COLOURS, *SHAPES)},
    **dict.fromkeys(("tiny", "little"), "small"),
    **dict.fromkeys(("big", "huge"), "large"),
    **dict.fromkeys(("round", "ball"), "circle"),
    "box": "square",
    "pyramid": "triangle",
    "plus": "cross",
}
# A picture is none of the drawings where it is further from the nearest than this share of that one's way from white.
UNLIKE = 0.6

Kind = tuple[str, str, str]


def request(wish: str) -> list[dict[str, str]]:
    """What the writer is told: its task, two examples, and the wish."""
    said = (("system", "You write the prompt of an image model."), *EXAMPLES, ("user", wish))
    return [{"role": role, "content": content} for role, content in said]


def wanted(wish: str) -> Kind:
    """Size, colour and shape that a wish asks for. Raises `ValueError` for one that does not say each of them once."""
    found = [WORDS[word] for word in re.findall("[a-z]+", wish.lower()) if word in WORDS]
    kind = tuple(word for group in (RADII, COLOURS, SHAPES) for word in found if word in group)
    if kind not in kinds():
        raise ValueError(f"the wish {wish!r} does not say one size, one colour and one shape")
    return kind


def shown(picture: Any) -> Kind | None:
    """Size, colour and shape of the drawing that a picture [height, width, 3] in [0, 1] is most like, if of any."""
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)) / 255
    nearest = int(distance(drawings(), small).argmin())
    drawing = drawings()[nearest]
    return kinds()[nearest] if distance(drawing, small) < UNLIKE * distance(drawing, BACKGROUND) else None


def score(run: Mapping[str, Any]) -> float:
    """The share of size, colour and shape in which the picture is what the wish asks for; 0 for no drawing."""
    seen = shown(run["picture"])
    return 0.0 if seen is None else float(np.mean([a == b for a, b in zip(seen, wanted(run["wish"]), strict=True)]))


def right(run: Mapping[str, Any]) -> float:
    """1 for a picture that is what the wish asks for in all respects, else 0."""
    return float(shown(run["picture"]) == wanted(run["wish"]))


def distance(one: Any, other: Any) -> Any:
    """Root of the mean square of the difference of pictures."""
    return np.sqrt(np.mean((np.asarray(one) - np.asarray(other)) ** 2, axis=(-3, -2, -1)))


@cache
def kinds() -> tuple[Kind, ...]:
    """All that can be asked for."""
    return tuple(product(RADII, COLOURS, SHAPES))


@cache
def drawings() -> Float[np.ndarray, "kinds side side 3"]:
    """One of each kind."""
    return np.stack([drawn(RADII[size], COLOURS[colour], shape) for size, colour, shape in kinds()])


def drawn(
    radius: float, colour: Sequence[float] | Float[np.ndarray, "3"], shape: str
) -> Float[np.ndarray, "side side 3"]:
    """A shape on white. radius: in pixels."""
    points = ((np.arange(SIDE * FINE) + 0.5) / FINE - SIDE / 2) / radius
    inside = SHAPES[shape](points[None, :], -points[:, None]).reshape(SIDE, FINE, SIDE, FINE)
    cover = inside.mean(axis=(1, 3))[..., None]
    return cover * np.array(colour) + (1 - cover) * np.array(BACKGROUND)
