"""What experiments/compile_tpu.py printed, as a table: a row for each file of docs/scaling/."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    *("system", "mode", "topology", "level", "pairs", "tokens", "pixels", "M"),
    *("arguments", "temporaries", "peak", "of", "compile s"),
)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their file names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def figures_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Markdown. Memory of one chip in GiB; pixels a side; M: intermediates."""
    rules = ["---"] * 4 + ["---:"] * (len(COLUMNS) - 4)
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, rules, *map(_row, results)))


def _row(result: Mapping[str, Any]) -> list[str]:
    names = ("system", "mode", "topology", "level", "pairs_per_step", "sequence", "image_size", "intermediates")
    memory = result["memory_per_chip_gib"]
    held = [memory[name] for name in ("arguments", "temporaries", "peak")] + [result["usable_hbm_gib"]]
    sizes = ("–" if result[name] is None else str(result[name]) for name in names)  # noqa: RUF001
    return [*sizes, *(f"{size:.2f}" for size in held), f"{result['seconds']['compile']:.0f}"]
