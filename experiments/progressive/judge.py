"""The judge of a run, which measures the pictures and never sees the captions, and the figures of a run's health."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from experiments.progressive.world import ATTRIBUTES, CAPTIONS, OBJECTS, Request, parse, render, well_formed
from sysdpo_jax.evaluation import (
    CalibratedScorer,
    brightness,
    height,
    order_consistency,
    preference_score,
    redness,
    size,
)
from sysdpo_jax.typing import Record

MEASURES = {"bright": brightness, "large": size, "red": redness, "high": height}


@cache
def scorers() -> dict[str, CalibratedScorer]:
    """One scorer an attribute, calibrated on the renderer: on average over objects a picture of value v scores v."""
    made = {}
    for name, measure in MEASURES.items():
        ends = {other: np.full(2, 0.5) for other in ATTRIBUTES} | {name: np.array([0.0, 1.0])}
        low, high = np.mean([measure(render(shape, ends)) for shape in OBJECTS], axis=0)
        made[name] = CalibratedScorer(measure, float(low), float(high))
    return made


def measure(images: Float[np.ndarray, "batch height width 3"]) -> dict[str, Float[np.ndarray, "batch"]]:
    """{attribute: score of each picture}."""
    return {name: scorer(images) for name, scorer in scorers().items()}


def grades(requests: Sequence[Request], records: Sequence[Record]) -> Float[np.ndarray, "runs 3"]:
    """The asked attribute of each run's three pictures, turned so that the asked order is an increasing one.

    An attribute is at most fully there: measurements outside [0, 1] count as its ends, or overdone pictures would win.
    """
    images = np.asarray([record["images"] for record in records])
    measured = measure(images.reshape(-1, *images.shape[2:]))
    rows = [np.clip(measured[r.attribute][CAPTIONS * i : CAPTIONS * (i + 1)], 0, 1) for i, r in enumerate(requests)]
    signs = np.array([1.0 if r.direction == "more" else -1.0 for r in requests])
    return np.asarray(rows) * signs[:, None]


def score(run: Record) -> float:
    """The preference score of one run."""
    return float(preference_score(_own_grades(run))[0])


def in_order(run: Record) -> float:
    """Whether the three pictures of one run are in the asked order."""
    return float(order_consistency(_own_grades(run))[0])


def _own_grades(run: Record) -> Float[np.ndarray, "1 3"]:
    return grades([Request.parse(run["request"])], [run])


def caption_grades(request: Request, answer: str) -> Float[np.ndarray, "3"]:
    """The adverbs' values in the asked direction: what a judge of the language model's own output sees."""
    sign = 1.0 if request.direction == "more" else -1.0
    return sign * np.array([caption.value for part in answer.split(";") if (caption := parse(part)) is not None])


def answer_score(request: Request, answer: str) -> float:
    """The preference score of the captions alone; an answer that is not well formed is worse than any other."""
    if not well_formed(request, answer):
        return -3.0
    return float(preference_score(caption_grades(request, answer)[None])[0])


def fidelity(records: Sequence[Record]) -> float:
    """Root mean squared error of the pictures against exact drawings of their own measured attributes.

    The object is the caption's; pictures of captions that are none are left out.
    """
    images = np.asarray([record["images"] for record in records])
    images = images.reshape(-1, *images.shape[2:])
    captions = [parse(text) for record in records for text in record["captions"]]
    measured, errors = measure(images), []
    for shape in OBJECTS:
        rows = np.array([caption is not None and caption.object == shape for caption in captions])
        if rows.any():
            errors.append((images[rows] - render(shape, {name: v[rows] for name, v in measured.items()})) ** 2)
    return float(np.sqrt(np.concatenate(errors).mean()))
