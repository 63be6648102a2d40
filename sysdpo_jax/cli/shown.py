"""Which runs of the evaluations a report shows, and how."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sysdpo_jax.cli.run import Run
from sysdpo_jax.report import ComparedRuns, ShownRun
from sysdpo_jax.runs.held_out import FOLDER, runs_name
from sysdpo_jax.runs.runs_file import run_lines, with_images


def compared_runs(run: Run, steps: Mapping[str, int]) -> Iterator[ComparedRuns]:
    """The first run of some prompts at the evaluations of `steps`, {name: step}, that before training first.

    As many prompts as `evaluation.shown`, evenly spaced: nobody chose them.
    """
    firsts = {name: _first_runs(run, step) for name, step in steps.items()}
    # A tool may have left a run out of one of them.
    both = [name for name in next(iter(firsts.values()), {}) if all(name in runs for runs in firsts.values())]
    for place in spread(len(both), run.config.evaluation.shown):
        made = {name: runs[both[place]] for name, runs in firsts.items()}
        yield _compared(run, {name: with_images(line, path) for name, (line, path) in made.items()})


def spread(number: int, shown: int) -> list[int]:
    """Indices of at most `shown` of so many, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, min(number, shown)).round().astype(int)).tolist()


def _first_runs(run: Run, step: int) -> dict[str, tuple[dict[str, Any], Path]]:
    """{id: line and file} of the first run of each prompt."""
    path = Path(run.config.directory) / FOLDER / runs_name(step)
    return {line["id"]: (line, path) for line in run_lines(path) if line["id"].endswith("-0")}


def _compared(run: Run, made: Mapping[str, Mapping[str, Any]]) -> ComparedRuns:
    first, *_ = made.values()
    shown = tuple(
        ShownRun(name, {node.name: one["outputs"][node.name] for node in run.system.nodes}, _score(one, first))
        for name, one in made.items()
    )
    return ComparedRuns(f"run {first['id']}", {name: first["inputs"][name] for name in run.system.inputs}, shown)


def _score(one: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    scores: Sequence[float | None] = (one["score"], before["score"])
    if scores[0] is None:
        return "none"
    if one is before or scores[1] is None:
        return f"{scores[0]:.4g}"
    verdict = "win" if scores[0] > scores[1] else "loss" if scores[0] < scores[1] else "tie"
    return f"{scores[0]:.4g} ({verdict})"
