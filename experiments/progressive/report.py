"""What is said of the experiment: its figures, comparisons, and sequences of pictures before and after."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common.results import Figure, Results
from experiments.common.runs import Figures
from experiments.progressive.run import SeedRun
from experiments.progressive.world import split_captions
from sysdpo_jax.report import Column, ImageRow, ImageSequence

SHOWN = ("before", "sysdpo", "sysdpo_online")


def sequences(run: SeedRun, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """The first run of each request, for the methods that are shown."""

    def sequence(method: str, row: int) -> ImageSequence:
        columns = figures[method]
        captions = tuple(split_captions(str(columns["answer"][row])))
        return ImageSequence(method, columns["images"][row].astype(np.float64), captions)

    texts, first = np.unique(figures[SHOWN[0]]["request"], return_index=True)
    rows = [tuple(sequence(method, row) for method in SHOWN) for row in first]
    return {"images": tuple(ImageRow(str(text), row) for text, row in zip(texts, rows, strict=True))}


RESULTS = Results(
    title="Progressive images: a language model and a diffusion model aligned as one system",
    description="A request asks for three pictures in which an attribute grows or shrinks. A language model writes "
    "three captions, a diffusion model draws them, and a judge measures the pictures. Figures are of held-out "
    "requests. Standard errors are clustered by request and seed; what another training seed would change is not in "
    "them, so the tables by seed stand beside.",
    inputs="requests",
    cluster="request",
    figures={
        "preference_score": Figure("score", Column("preference score")),
        "order_consistency": Figure("order", Column("order consistency", digits=1, percent=True)),
        "well_formed": Figure("well_formed", Column("well-formed answers", 1, percent=True, best=None), error=False),
        "caption_entropy": Figure("surprise", Column("answer entropy (nats)", 2, best=None), error=False),
        "fidelity_error": Figure("fidelity", Column("drawing error", best=None), error=False),
    },
    # What the main comparison must show: method, and the ones it is compared with.
    comparisons=(
        ("sysdpo", "before"),
        ("sysdpo", "lm_only"),
        ("sysdpo", "diffusion_only"),
        ("sysdpo", "separate_system"),
        ("sysdpo", "separate_local"),
        ("sysdpo_online", "best_of_n"),
        ("sysdpo_online", "sysdpo"),
    ),
    samples=sequences,
    wins=True,
)
