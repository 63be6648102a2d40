"""Metrics of a run on disk: metrics.jsonl, one object a step, and TensorBoard events beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class MetricsLog:
    """Appends rows {"step": k, metric: value} to `directory`/metrics.jsonl and scalars to TensorBoard events.

    start: the step that the run continues with; rows of it and later ones, left by a run that was killed after its last
    checkpoint, are removed, and TensorBoard is told to hide them. A value that is not finite is written as null.
    """

    def __init__(self, directory: str | Path, start: int):
        # Imported late: tensorboardX imports torch where it is installed, and `import sysdpo_jax` must not.
        from tensorboardX import SummaryWriter

        path = Path(directory) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(path.parent), purge_step=start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, metrics: Mapping[str, float | np.ndarray]) -> None:
        """One row. metrics: `{name: scalar}`."""
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Return once the rows are on disk: before a checkpoint that counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics.jsonl; a last row that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _truncate(path: Path, start: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] < start]
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shorter.replace(path)
