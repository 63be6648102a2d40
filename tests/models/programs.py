"""What JAX compiles while something runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def compiling() -> Iterator[list[dict[str, Any]]]:
    """What is known of each program that is compiled in the block or taken from the cache on disk."""
    programs: list[dict[str, Any]] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            programs.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
