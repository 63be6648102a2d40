"""Tracing some steps of a run with jax.profiler."""

from pathlib import Path

import jax

from sysdpo_jax.training.step import Metrics


class Profile:
    """Traces the steps [first, last) with jax.profiler."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._running = steps or (0, 0), directory, False

    def before(self, step: int) -> None:
        first, last = self._steps
        if not self._running and first <= step < last:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        if self._running and step + 1 == self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
