"""Weights & Biases: a side output, which training neither waits for nor ends with."""

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any

from sysdpo_jax.io import write_whole
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.training.progress import tell

# Seconds that it may take, when training has ended, to send what is left.
FINISH = 10.0


def import_wandb() -> Any:
    """The module. Raises `ImportError` with the remedy where it is absent."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "Weights & Biases was asked for, but wandb is not installed: pip install wandb, or leave it out"
        ) from error
    return wandb


class Tracker:
    """A run of Weights & Biases, the same one whenever the directory's run goes on.

    One thread talks to it, so that neither a network that is away nor a service that hangs holds up a step; the first
    failure is told as a warning, and no more is sent.

    Args:
        directory: Of the run; the file wandb-id keeps the run's name there.
        settings: What wandb.init takes.

    Raises:
        ImportError: wandb is absent.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self._wandb = import_wandb()
        self._run: Any = None
        name = directory / "wandb-id"
        if not name.exists():
            write_whole(name, uuid.uuid4().hex[:12])
        own = {"dir": str(directory), "id": name.read_text(encoding="utf-8"), "resume": "allow"}
        self._failed = False
        self._thread = DaemonExecutor(1, "wandb")
        self._last = self._send(lambda: self._start({**own, **settings}))

    def log(self, row: Mapping[str, float | int]) -> None:
        """Send a row, later."""
        self._last = self._send(lambda: self._run.log(row))

    def finish(self, exit_code: int) -> None:
        """End the run there, once all rows are sent; give up after `FINISH` seconds, with a warning."""
        self._last = self._send(lambda: self._run.finish(exit_code=exit_code))
        try:
            self._last.result(FINISH)
        except TimeoutError:
            self._warn(f"it did not take all rows within {FINISH:.0f} seconds of the end")
        else:
            self._thread.shutdown()

    def _start(self, settings: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(**settings)
        # Steps are a metric of their own: wandb's own count takes no row of a step before its last one.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _send(self, call: Callable[[], object]) -> Future[None]:
        def tried() -> None:
            if self._failed:
                return
            try:
                call()
            except (Exception, SystemExit) as error:
                self._warn(f"{type(error).__name__}: {error}")

        return self._thread.submit(tried)

    def _warn(self, what: str) -> None:
        if self._failed:
            return
        self._failed = True
        tell(f"warning: Weights & Biases gets no more of this run ({' '.join(what.split())}); metrics.jsonl goes on")
