"""The world of the experiment: requests, captions, a renderer of pictures whose attributes pixels can measure, faults.

A request asks for three pictures of an object in which one attribute grows ("more") or shrinks ("less"). Everything is
drawn from formulas; nothing is downloaded. Attribute values lie in [0, 1].

The reference system is trained on data with the faults that alignment is to fix. The language model sees only requests
of the training split, and only a share of its answers is in order. The image model learns to draw adverbs too close to
the middle, with noise, and with two of them exchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float

SIZE = 12
OBJECTS = ("ball", "box", "gem", "ring", "cross", "hill", "leaf", "bar")
ATTRIBUTES = ("bright", "large", "red", "high")
DIRECTIONS = ("more", "less")
ADVERBS = ("barely", "slightly", "somewhat", "fairly", "quite", "very", "extremely")
ARTICLES = ("a", "the")
CAPTIONS = 3
CAPTION_WORDS = 4
SEPARATOR = ";"

# Renderer: shape radius in pixels, colours and vertical room at the ends of each attribute.
BACKGROUND = 0.1
RADII = (1.5, 3.7)
LIGHT = (0.4, 1.0)
ROOM = 3.0


@dataclass(frozen=True, order=True)
class Request:
    """What is asked for: one object, one attribute, one direction."""

    object: str
    attribute: str
    direction: str

    @property
    def text(self) -> str:
        return f"a {self.object} getting {self.direction} {self.attribute}"

    @classmethod
    def parse(cls, text: str) -> "Request":
        """The request of such a text."""
        _, name, _, direction, attribute = text.split()
        return cls(name, attribute, direction)


@dataclass(frozen=True)
class World:
    """The part of the world in use. held_out, validation: how many requests are kept out of alignment."""

    objects: tuple[str, ...] = OBJECTS
    attributes: tuple[str, ...] = ATTRIBUTES
    validation: int = 8
    held_out: int = 16

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(Request(*parts) for parts in product(self.objects, self.attributes, DIRECTIONS))

    def split(self, seed: int) -> dict[str, tuple[Request, ...]]:
        """Disjoint requests "train", "validation" and "test", by a permutation of the seed."""
        order = np.random.default_rng((seed, 0)).permutation(len(self.requests))
        shuffled = [self.requests[i] for i in order]
        test, rest = shuffled[: self.held_out], shuffled[self.held_out :]
        parts = {"test": test, "validation": rest[: self.validation], "train": rest[self.validation :]}
        return {name: tuple(part) for name, part in parts.items()}


@dataclass(frozen=True)
class Caption:
    """[article] ADVERB ADJECTIVE OBJECT."""

    article: str
    adverb: str
    attribute: str
    object: str

    @property
    def text(self) -> str:
        return f"{self.article} {self.adverb} {self.attribute} {self.object}"

    @property
    def value(self) -> float:
        """The attribute's value that the adverb stands for."""
        return ADVERBS.index(self.adverb) / (len(ADVERBS) - 1)


@dataclass(frozen=True)
class Faults:
    """What is wrong with the training data.

    ordered: share of answers whose captions are in the asked order; the others are in random order.
    contrast: adverbs are drawn at 0.5 + contrast (value - 0.5); noise: standard deviation of the drawn value.
    exchanged: two adverbs, each drawn as the other.
    """

    ordered: float = 0.6
    contrast: float = 0.6
    noise: float = 0.3
    exchanged: tuple[int, int] = (1, 3)


VOCABULARY = ("getting", *DIRECTIONS, *ARTICLES, *ADVERBS, *ATTRIBUTES, *OBJECTS, SEPARATOR)


def parse(text: str) -> Caption | None:
    """The caption, or None for text that is none."""
    words = text.split()
    known = (ARTICLES, ADVERBS, ATTRIBUTES, OBJECTS)
    if len(words) != len(known) or any(word not in group for word, group in zip(words, known, strict=True)):
        return None
    return Caption(*words)


def split_captions(answer: str) -> list[str]:
    """The tool between the two models: three captions from one answer.

    Missing captions are empty; further ones, and words beyond those of a caption, are dropped.
    """
    parts = [" ".join(part.split()[:CAPTION_WORDS]) for part in answer.split(SEPARATOR)][:CAPTIONS]
    return parts + [""] * (CAPTIONS - len(parts))


def join_captions(captions: Sequence[Caption]) -> str:
    """The answer that `split_captions` takes apart."""
    return f" {SEPARATOR} ".join(caption.text for caption in captions)


def well_formed(request: Request, answer: str) -> bool:
    """Whether the answer is three captions about the object and the attribute of the request."""
    captions = [parse(part) for part in answer.split(SEPARATOR)]
    return len(captions) == CAPTIONS and all(
        caption is not None and (caption.object, caption.attribute) == (request.object, request.attribute)
        for caption in captions
    )


def render(shape: str, values: Mapping[str, Float[np.ndarray, "batch"]]) -> Float[np.ndarray, "batch height width 3"]:
    """Pictures of one object: {attribute: value of each picture} -> pixels in [0, 1].

    "bright": the colour's strength; "large": the area; "red": blue to red; "high": bottom to top. Each is linear in
    what a scorer measures. Values may leave [0, 1]; pixels may not.
    """
    bright, large, red, high = (np.asarray(values[name], np.float64)[:, None, None] for name in ATTRIBUTES)
    area = RADII[0] ** 2 + (RADII[1] ** 2 - RADII[0] ** 2) * np.clip(large, -0.1, 1.2)
    scale = np.sqrt(area) / _unit_radius(shape)
    cover = _coverage(shape, SIZE, scale, ROOM * (2 * high - 1))[..., None]
    strength = LIGHT[0] + (LIGHT[1] - LIGHT[0]) * bright
    colour = strength[..., None] * np.stack([0.1 + 0.9 * red, 0.5 + 0 * red, 1.0 - 0.9 * red], axis=-1)
    return np.clip(BACKGROUND + cover * (colour - BACKGROUND), 0, 1)


def answers(requests: Sequence[Request], faults: Faults, number: int, seed: int) -> tuple[list[str], list[str]]:
    """`number` answers and the texts of their requests."""
    rng = np.random.default_rng((seed, 1))
    made, asked = [], []
    for request in (requests[i] for i in rng.integers(len(requests), size=number)):
        levels = rng.choice(len(ADVERBS), CAPTIONS, replace=False)
        if rng.random() < faults.ordered:
            levels = np.sort(levels)[:: 1 if request.direction == "more" else -1]
        articles = rng.choice(ARTICLES, CAPTIONS)
        captions = [
            Caption(str(article), ADVERBS[level], request.attribute, request.object)
            for article, level in zip(articles, levels, strict=True)
        ]
        made.append(join_captions(captions))
        asked.append(request.text)
    return made, asked


def pictures(world: World, faults: Faults, number: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`number` images and their captions."""
    rng = np.random.default_rng((seed, 2))
    shown = np.arange(len(ADVERBS))
    shown[list(faults.exchanged)] = shown[list(faults.exchanged[::-1])]
    shapes = rng.integers(len(world.objects), size=number)
    picked = rng.integers(len(world.attributes), size=number)
    levels = rng.integers(len(ADVERBS), size=number)
    values = {name: 0.5 + rng.uniform(-0.1, 0.1, number) for name in ATTRIBUTES}
    wanted = 0.5 + faults.contrast * (shown[levels] / (len(ADVERBS) - 1) - 0.5)
    drawn = np.clip(wanted + faults.noise * rng.standard_normal(number), 0, 1)
    for index, name in enumerate(world.attributes):
        values[name] = np.where(picked == index, drawn, values[name])
    images = np.zeros((number, *render(world.objects[0], {name: np.zeros(1) for name in ATTRIBUTES}).shape[1:]))
    for index, shape in enumerate(world.objects):
        rows = shapes == index
        images[rows] = render(shape, {name: value[rows] for name, value in values.items()})
    articles = rng.choice(ARTICLES, number)
    captions = [
        Caption(str(articles[i]), ADVERBS[levels[i]], world.attributes[picked[i]], world.objects[shapes[i]]).text
        for i in range(number)
    ]
    return images, captions


def _coverage(
    shape: str, size: int, scale: Float[np.ndarray, "batch 1 1"], rise: Float[np.ndarray, "batch 1 1"]
) -> Float[np.ndarray, "batch height width"]:
    """Share of each pixel inside the shape, by 4 x 4 points a pixel."""
    fine = 4
    points = (np.arange(size * fine) + 0.5) / fine - size / 2
    x, y = points[None, None, :] / scale, (-points[None, :, None] - rise) / scale
    inside = _SHAPES[shape](x, y).astype(np.float64)
    return inside.reshape(-1, size, fine, size, fine).mean(axis=(2, 4))


def _unit_radius(shape: str) -> float:
    """Radius of the disc with the area of the shape at scale 1, so that all objects have the same area."""
    points = np.linspace(-2, 2, 801)
    return float(np.sqrt(_SHAPES[shape](points[None, :], points[:, None]).mean() * 16 / np.pi))


# Each is centred on the middle of its mass, within about one unit of it.
_SHAPES = {
    "ball": lambda x, y: x**2 + y**2 < 1,
    "box": lambda x, y: np.maximum(abs(x), abs(y)) < 0.9,
    "gem": lambda x, y: abs(x) + abs(y) < 1.2,
    "ring": lambda x, y: (x**2 + y**2 < 1.2) & (x**2 + y**2 > 0.3),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.35) & (np.maximum(abs(x), abs(y)) < 1.1),
    "hill": lambda x, y: (y > -0.6) & (abs(x) < 1.1 * (1.2 - y) / 1.8),
    "leaf": lambda x, y: (abs(x) + 0.5) ** 2 + y**2 < 1.3,
    "bar": lambda x, y: (abs(x) < 1.2) & (abs(y) < 0.55),
}
