"""The model card of an exported component: what it is part of, what it was trained on, and how it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sysdpo_jax.evaluation import too_few
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.report.outcome import ENDED, final_figures, interval_of, over
from sysdpo_jax.report.templates import render

# Of an evaluation, as `final_figures` names them.
EVALUATED = ("win_rate", "score_before", "score", "score_difference")


@dataclass(frozen=True)
class Part:
    """A component of the system. start: the checkpoint or the factory that it came from; mode: how it was trained."""

    name: str
    start: str
    mode: str


@dataclass(frozen=True)
class Training:
    """What a system was aligned with. version: of the library; data: has "source", "kept" and "sha256"."""

    kind: str
    loss: str
    beta: float
    batch_size: int
    version: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class ModelCard:
    """A card of one of the parts.

    rate, rank: its learning rate, and the rank of its LoRA, None for none. library: what loads the files, None for
    none. hub: names on the hub, as the fields "base_model" and "datasets" of the head. rows: the metrics of the run up
    to `step`.
    """

    part: Part
    rate: float
    rank: int | None
    library: str | None
    hub: Mapping[str, str]
    step: int
    system: CompoundSystem
    parts: tuple[Part, ...]
    training: Training
    rows: Sequence[Mapping[str, Any]]

    @property
    def head(self) -> str:
        """The front matter, as YAML."""
        tag = "text-to-image" if self.library == "diffusers" else "text-generation"
        loaded = {} if self.library is None else {"library_name": self.library, "pipeline_tag": tag}
        return yaml.safe_dump(loaded | {"tags": ["sysdpo", "dpo", "compound-system"]} | self.hub, sort_keys=False)

    @property
    def figures(self) -> list[tuple[str, str, int]]:
        """Name, value and step: of the best evaluation, then the last of each figure of training."""
        final = final_figures(self.rows)
        figures = [(f"eval/{name}", _ranged(final, name), int(final["step"])) for name in EVALUATED if name in final]
        last = {name: row for row in self.rows for name in ENDED if row.get(name) is not None}
        return figures + [(name, f"{last[name][name]:.4g}", last[name]["step"]) for name in sorted(last)]

    @property
    def evaluated(self) -> str:
        """What the figures of the evaluation are of, in a sentence; empty without an evaluation."""
        final = final_figures(self.rows)
        if not final:
            return ""
        intervals = any(interval_of(final, name) for name in EVALUATED)
        brackets = "brackets hold 95% intervals" if intervals else None
        return "; ".join(filter(None, (f"Evaluated on {over(final)}", brackets, too_few(int(final["prompts"]))))) + "."

    def text(self) -> str:
        """The README.md."""
        return render("model_card.md.jinja", card=self)


def _ranged(figures: Mapping[str, float], name: str) -> str:
    ends = interval_of(figures, name)
    return f"{figures[name]:.4g}" + ("" if ends is None else f" [{ends.low:.3g}, {ends.high:.3g}]")
