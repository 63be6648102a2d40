"""What is said of the experiment: its figures, comparisons, and drafts and answers before and after."""

from collections.abc import Mapping
from typing import Any

from experiments.collaboration.run import SeedRun
from experiments.collaboration.task import ANSWER, DRAFT
from experiments.common.results import Figure, Results
from experiments.common.runs import Figures
from sysdpo_jax.report import Column, TextTable

SHOWN = ("prompted", "sysdpo_sampling")
QUESTIONS_SHOWN = 12


def samples(run: SeedRun, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """The first run of the first questions, for the methods that are shown."""
    inputs, before = run.system.inputs, figures[SHOWN[0]]
    rows = []
    for number in range(min(QUESTIONS_SHOWN, len(set(before["question"])))):
        row = number * run.config.test_samples
        cells = [str(before[name][row]) for name in inputs]
        for method in SHOWN:
            mark = "right" if figures[method]["right"][row] else "wrong"
            cells += [str(figures[method][DRAFT][row]), f"{figures[method][ANSWER][row]} ({mark})"]
        rows.append(tuple(cells))
    header = (*inputs, *(f"{node}, {method}" for method in SHOWN for node in (DRAFT, ANSWER)))
    return {"texts": (TextTable("Held-out questions: one run each", header, tuple(rows)),)}


RESULTS = Results(
    title="Two language models in sequence, aligned as one system",
    description="A first language model drafts, a second one turns the draft into the answer and sees only a part of "
    "the question. A program checks the answer alone. Figures are of sampled runs on held-out questions. Standard "
    "errors are clustered by question and seed; what another training seed would change is not in them, so the tables "
    "by seed stand beside.",
    inputs="questions",
    cluster="question",
    figures={
        "accuracy": Figure("right", Column("right answers", digits=1, percent=True)),
        "score": Figure("score", Column("score", digits=1, percent=True)),
    },
    # What the main comparison must show: method, and the ones it is compared with.
    comparisons=(
        ("sysdpo_sampling", "prompted"),
        ("sysdpo_sampling", "first_only"),
        ("sysdpo_sampling", "second_only"),
        ("sysdpo_sampling", "separate"),
        ("sysdpo_sampling", "separate_sampling"),
        ("sysdpo_sampling", "sysdpo_direct"),
        ("sysdpo_sampling", "best_of_n"),
        ("sysdpo_direct", "separate"),
    ),
    samples=samples,
)
