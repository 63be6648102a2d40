"""Supervised training of the reference system, on data with the faults that alignment is to fix.

The language model sees only requests of the training split, and only a share of its answers is in order. The image
model learns to draw adverbs too close to the middle, with noise, and with two of them exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.progressive.world import (
    ADVERBS,
    ARTICLES,
    ATTRIBUTES,
    CAPTIONS,
    Caption,
    Request,
    World,
    join_captions,
    render,
)


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
