"""The model card of an exported component: what it is part of, what it was trained on, and how it did."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import sysdpo_jax as sj
from sysdpo_jax.cli.outcome import final_figures, interval_of, over
from sysdpo_jax.cli.report import ENDED
from sysdpo_jax.cli.run import DATA, Run, best_of
from sysdpo_jax.data.files import LINES, TABLE
from sysdpo_jax.evaluation import too_few
from sysdpo_jax.training.metrics import read_metrics

# Of an evaluation, as `final_figures` names them.
EVALUATED = ("win_rate", "score_before", "score", "score_difference")
PAPER = "[arXiv 2502.17721](https://arxiv.org/abs/2502.17721)"


def model_card(directory: Path, run: Run, step: int) -> Callable[[str, str | None], str]:
    """`card(component, library)`: the text of its README.md.

    directory: of the run. step: of the exported checkpoint. library: what loads the files, None for none.
    """
    data = json.loads((directory / DATA).read_text(encoding="utf-8"))
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if row["step"] <= step]
    return lambda name, library: "\n".join(_lines(run, name, library, step, data, rows)) + "\n"


def _lines(
    run: Run, name: str, library: str | None, step: int, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    component = run.config.system.components[name]
    start = component.checkpoint or component.factory
    head: dict[str, Any] = {"tags": ["sysdpo", "dpo", "compound-system"]}
    if library is not None:
        tag = "text-to-image" if library == "diffusers" else "text-generation"
        head = {"library_name": library, "pipeline_tag": tag} | head
    # The hub links names of its own, and refuses others.
    for field, source in (("base_model", component.checkpoint), ("datasets", data["source"])):
        if source is not None and _on_hub(source):
            head[field] = source
    yield f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"
    yield f"# {name}, aligned as a part of a compound system\n"
    yield (
        f"{start} after {step} steps of SysDPO-{run.config.objective.kind.capitalize()} ({PAPER}): the "
        "system below was aligned from preferences on what it produces as a whole. It was not judged by itself.\n"
    )
    yield f"```mermaid\n{run.system.describe()}\n```\n"
    yield "| component | started from | mode |\n| --- | --- | --- |"
    for other, each in run.config.system.components.items():
        yield f"| {other} | {each.checkpoint or each.factory} | {each.mode} |"
    yield "\n## Training\n"
    objective, schedule = run.config.objective, run.config.schedule
    rate = schedule.learning_rate if component.learning_rate is None else component.learning_rate
    lora = f", LoRA of rank {component.lora.rank}" if component.mode == "lora" else ""
    yield (
        f"Loss {objective.loss}, beta {objective.beta}; {schedule.batch_size} pairs a step, AdamW at {rate:g}{lora}; "
        f"sysdpo_jax {sj.__version__}.\n"
    )
    pairs = "prompts of online rounds" if data["kept"] is None else f"{data['kept']} preferences"
    yield f"Data: {data['source']}, {pairs}, SHA-256 {data['sha256']}.\n"
    yield "## Figures\n"
    yield "| figure | value | step |\n| --- | ---: | ---: |"
    final = final_figures(rows, best_of(run.config))
    intervals = {title: interval_of(final, title) for title in EVALUATED if title in final}
    for title, ends in intervals.items():
        shown = "" if ends is None else f" [{ends.low:.3g}, {ends.high:.3g}]"
        yield f"| eval/{title} | {final[title]:.4g}{shown} | {final['step']:.0f} |"
    for title, (value, at) in _last_figures(rows).items():
        yield f"| {title} | {value:.4g} | {at} |"
    if final:
        few = too_few(int(final["prompts"]))
        brackets = "brackets hold 95% intervals" if any(intervals.values()) else None
        yield "\n" + "; ".join(filter(None, (f"Evaluated on {over(final)}", brackets, few))) + "."


def _on_hub(source: str) -> bool:
    path = Path(source)
    named = re.fullmatch(r"([\w.-]+/)?[\w.-]+", source) is not None
    return named and not path.exists() and path.suffix not in (*LINES, *TABLE, ".gguf")


def _last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """{name: (value, step)}, the last ones, of each figure of training."""
    last: dict[str, tuple[float, int]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and name in ENDED:
                last[name] = (value, row["step"])
    return dict(sorted(last.items()))
