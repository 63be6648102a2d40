"""What several processes of JAX do together."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def by_all(work: Callable[[], T]) -> T:
    """What the work gives, once it is done on every process. Where one of them fails, all do."""
    error: Exception | None = None
    try:
        made = work()
    except Exception as own:
        error = own
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if error is None and len(failed):
            raise RuntimeError(f"process {failed[0]} failed: see what it says")
    if error is not None:
        raise error
    return made
