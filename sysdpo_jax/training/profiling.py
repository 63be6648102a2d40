"""Tracing some steps of a run with jax.profiler."""

from pathlib import Path

import jax

from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.step import StepMetrics


class Profile:
    """Traces the steps [first, last) with jax.profiler; a trace that cannot be written costs a warning."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._running = steps or (0, 0), directory, False

    def before(self, step: int) -> None:
        first, last = self._steps
        if not self._running and first <= step < last:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: StepMetrics) -> None:
        if self._running and step + 1 == self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            tell(f"warning: the trace of the steps is not written to {self._directory}: {error}")
