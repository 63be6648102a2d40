"""The model card of an exported component: what it is part of, what it was trained on, and how it did."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sysdpo_jax.evaluation import too_few
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.report.curves import Rows
from sysdpo_jax.report.outcome import BEST, ENDED, Best, Figures, final_figures, interval_of, over, portable
from sysdpo_jax.report.page import render

# Of an evaluation, as `final_figures` names them.
EVALUATED = ("win_rate", "score_before", "score", "score_difference")


def model_card(
    name: str,
    library: str | None,
    hub: Mapping[str, str],
    system: CompoundSystem,
    configuration: Mapping[str, Any],
    data: Mapping[str, Any],
    rows: Rows,
    step: int,
    version: str,
    best: Best = BEST,
) -> str:
    """The text of the README.md of a component.

    Args:
        name: of the component.
        library: what loads its files, None for none.
        hub: names on the hub, as the fields "base_model" and "datasets" of the head.
        system: what was aligned.
        configuration: of the run, as it is written in its folder.
        data: "source", "kept" and "sha256" of the preferences; of online rounds those of their prompts, without "kept".
        rows: the metrics of the run up to the step.
        step: of the exported checkpoint.
        version: of the library.
        best: by which figure an evaluation is the best.
    """
    tag = "text-to-image" if library == "diffusers" else "text-generation"
    loaded = {} if library is None else {"library_name": library, "pipeline_tag": tag}
    head = yaml.safe_dump({**loaded, "tags": ["sysdpo", "dpo", "compound-system"], **hub}, sort_keys=False)
    data = portable(data, Path(configuration["directory"]))
    run = {"system": system, "configuration": configuration, "data": data, "step": step, "version": version}
    final = final_figures(rows, best)
    figures, evaluated = tuple(_figures(rows, final)), _evaluated(final)
    return render("model_card.md.jinja", name=name, head=head, figures=figures, evaluated=evaluated, **run)


def _figures(rows: Rows, final: Figures) -> Iterator[tuple[str, str, int]]:
    """Name, value and step: of the best evaluation, then the last of each figure of training."""
    for name in EVALUATED if final else ():
        ends = interval_of(final, name)
        shown = "" if ends is None else f" [{ends.low:.3g}, {ends.high:.3g}]"
        yield f"eval/{name}", f"{final[name]:.4g}{shown}", int(final["step"])
    last = {name: row for row in rows for name in ENDED if row.get(name) is not None}
    for name in sorted(last):
        yield name, f"{last[name][name]:.4g}", last[name]["step"]


def _evaluated(final: Figures) -> str:
    """What the figures of the evaluation are of, in a sentence; empty without an evaluation."""
    if not final:
        return ""
    brackets = "brackets hold 95% intervals" if any(interval_of(final, name) for name in EVALUATED) else None
    return "; ".join(filter(None, (f"Evaluated on {over(final)}", brackets, too_few(int(final["prompts"]))))) + "."
