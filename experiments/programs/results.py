"""The figures of docs/programs/pictures.md out of a run of `sysdpo online pictures`, and some of its pictures.

example:
  python -m experiments.programs.results runs/pictures --output docs/programs/pictures.json

Beside the file of figures comes a .png: before above, after below, a wish a column.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sysdpo_jax.evaluation import clustered_mean, paired_difference
from sysdpo_jax.recipes.pictures import kinds, shown, wanted

Rows = list[dict[str, Any]]
# Sides of a shown picture and of the white between two, in pixels; columns.
SIDE, GAP, COLUMNS = 64, 8, 8


def read(path: Path) -> Rows:
    """The runs of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(path: Path, row: Mapping[str, Any]) -> Image.Image:
    """The picture of a run of that file."""
    return Image.open(path.parent / row["outputs"]["picture"]).convert("RGB")


def compared(before: Sequence[float], after: Sequence[float], wishes: Sequence[str]) -> dict[str, Any]:
    """Both means and their paired difference, with errors clustered by wish."""
    estimates = {
        "before": clustered_mean(before, wishes),
        "after": clustered_mean(after, wishes),
        "difference": paired_difference(after, before, wishes),
    }
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def figures(paths: Sequence[Path]) -> dict[str, Any]:
    """Of the files of held-out runs before and after: all respects, each one, and how long the prompts are."""
    rows = [read(path) for path in paths]
    wishes = [row["inputs"]["wish"] for row in rows[0]]
    asked = [wanted(wish) for wish in wishes]
    seen = [
        [shown(np.asarray(picture(path, row)) / 255) for row in side] for path, side in zip(paths, rows, strict=True)
    ]

    def figure(of: Any) -> dict[str, Any]:
        before, after = (
            [float(of(*each)) for each in zip(side, asked, found, strict=True)]
            for side, found in zip(rows, seen, strict=True)
        )
        return compared(before, after, wishes)

    made = {
        "score": figure(lambda row, *_: row["score"]),
        "right": figure(lambda row, *_: row["figures"]["right"]),
        "a drawing": figure(lambda row, kind, found: found is not None),
        "words of a prompt": figure(lambda row, *_: len(row["outputs"]["prompt"]["text"].split())),
    }
    for place, name in enumerate(("size", "colour", "shape")):
        made[name] = figure(lambda row, kind, found, place=place: found is not None and found[place] == kind[place])
    return made


def shown_runs(paths: Sequence[Path]) -> tuple[Image.Image, Rows]:
    """The first run of a wish of each kind, as a picture and as texts."""
    rows = [read(path) for path in paths]
    first: dict[Any, int] = {}
    for place, row in enumerate(rows[0]):
        first.setdefault(wanted(row["inputs"]["wish"]), place)
    places = [first[kind] for kind in kinds() if kind in first][:COLUMNS]
    sheet = Image.new("RGB", (len(places) * (SIDE + GAP) + GAP, 2 * (SIDE + GAP) + GAP), "#dddddd")
    for line, (path, side) in enumerate(zip(paths, rows, strict=True)):
        for column, place in enumerate(places):
            drawn = picture(path, side[place]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(drawn, (GAP + column * (SIDE + GAP), GAP + line * (SIDE + GAP)))
    texts = [
        {
            "wish": rows[0][place]["inputs"]["wish"],
            **{
                name: side[place]["outputs"]["prompt"]["text"]
                for name, side in zip(("before", "after"), rows, strict=True)
            },
        }
        for place in places
    ]
    return sheet, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    paths = sorted((flags.run / "evaluation").glob("runs-*.jsonl"))
    ends = [paths[0], paths[-1]]
    results = json.loads((flags.run / "results.json").read_text())
    sheet, texts = shown_runs(ends)
    metrics = [json.loads(line) for line in (flags.run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    made = {
        "held_out": figures(ends),
        "shown": texts,
        "training": {
            name: [round(row[name], 4) for row in steps]
            for name in ("loss", "rewards/margins/prompt", "rewards/margins/picture")
            if name in steps[0]
        },
        "results": results,
    }
    flags.output.write_text(json.dumps(made, indent=1) + "\n")
    sheet.save(flags.output.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
