"""What experiments/compile_tpu.py printed, as a table: a row for each file of docs/scaling/."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sysdpo_jax.evaluation import Column, Row, Table

COLUMNS = (
    Column("pairs", 0, best=None),
    Column("tokens", 0, best=None),
    Column("pixels", 0, best=None),
    Column("M", 0, best=None),
    Column("arguments", 2, best=None),
    Column("temporaries", 2, best=None),
    Column("peak", 2, best=None),
    Column("of", 2, best=None),
    Column("compile s", 0, best=None),
)


def figures_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """Memory of one chip in GiB; pixels a side; M: intermediates."""
    return Table("Memory of one chip", COLUMNS, tuple(_row(result) for result in results), label="step")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their file names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _row(result: Mapping[str, Any]) -> Row:
    memory = result["memory_per_chip_gib"]
    held = (memory[name] for name in ("arguments", "temporaries", "peak"))
    sizes = (result[name] for name in ("pairs_per_step", "sequence", "image_size", "intermediates"))
    values = (*sizes, *held, result["usable_hbm_gib"], result["seconds"]["compile"])
    return Row(f"{result['system']}, {result['mode']}, {result['topology']}", values)
