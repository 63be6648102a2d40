"""The figures of docs/programs/pictures.md out of a run of `sysdpo online pictures`, and some of its pictures.

example:
  python -m experiments.programs.results runs/pictures --output docs/programs/pictures.json

Beside the file of figures comes a .png: before above, after below, a held-out kind a column.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.programs.estimates import compared
from sysdpo_jax.recipes.pictures import Kind, kinds, shown, wanted
from sysdpo_jax.training import read_metrics

# Sides of a shown picture and of the grey between two, in pixels.
SIDE, GAP = 64, 8
TRAINING = ("loss", "rewards/accuracies", "margin_share/picture", "drift/kl/prompt")


@dataclass(frozen=True)
class Run:
    """A held-out run, and what its picture shows."""

    wish: str
    prompt: str
    picture: Image.Image
    score: float
    right: float

    @property
    def kind(self) -> Kind:
        return wanted(self.wish)

    @property
    def shown(self) -> Kind | tuple[None, None, None]:
        return shown(np.asarray(self.picture) / 255) or (None, None, None)


FIGURES: dict[str, Callable[[Run], float]] = {
    "score": lambda run: run.score,
    "right": lambda run: run.right,
    "size": lambda run: run.shown[0] == run.kind[0],
    "colour": lambda run: run.shown[1] == run.kind[1],
    "shape": lambda run: run.shown[2] == run.kind[2],
    "no drawing": lambda run: run.shown[0] is None,
    "words of a prompt": lambda run: len(run.prompt.split()),
}


def read(path: Path) -> list[Run]:
    """The runs of a file of an evaluation."""

    def made(row: dict[str, Any]) -> Run:
        outputs = row["outputs"]
        image = Image.open(path.parent / outputs["picture"]).convert("RGB")
        return Run(row["inputs"]["wish"], outputs["prompt"]["text"], image, row["score"], row["figures"]["right"])

    return [made(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(before: Sequence[Run], after: Sequence[Run]) -> dict[str, Any]:
    """Both means and their paired difference, with standard errors clustered by wish."""
    wishes, made = np.array([run.wish for run in before]), {}
    for name, of in FIGURES.items():
        first, second = (np.array([float(of(run)) for run in runs]) for runs in (before, after))
        made[name] = compared(first, second, wishes)
    return made


def first_of_kinds(runs: Sequence[Run]) -> list[int]:
    """The place of the first run of each kind."""
    found = [run.kind for run in runs]
    return [found.index(kind) for kind in kinds() if kind in found]


def sheet(sides: Sequence[Sequence[Run]]) -> Image.Image:
    """Pictures of several systems, a line each."""
    size = [GAP + number * (SIDE + GAP) for number in (len(sides[0]), len(sides))]
    made = Image.new("RGB", (size[0], size[1]), "#dddddd")
    for line, runs in enumerate(sides):
        for column, run in enumerate(runs):
            large = run.picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            made.paste(large, (GAP + column * (SIDE + GAP), GAP + line * (SIDE + GAP)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    files = sorted((flags.run / "evaluation").glob("runs-*.jsonl"))
    before, after = read(files[0]), read(files[-1])
    steps = [row for row in read_metrics(flags.run / "metrics.jsonl") if "loss" in row]
    places = first_of_kinds(before)
    made = {
        "held_out": figures(before, after),
        "prompts": [
            {"wish": before[place].wish, "before": before[place].prompt, "after": after[place].prompt}
            for place in places
        ],
        "training": {name: [round(row[name], 4) for row in steps] for name in TRAINING if name in steps[0]},
        "results": json.loads((flags.run / "results.json").read_text()),
    }
    flags.output.write_text(json.dumps(made, indent=1) + "\n")
    shown_runs = [[runs[place] for place in places] for runs in (before, after)]
    sheet(shown_runs).save(flags.output.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
