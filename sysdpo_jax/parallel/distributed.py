"""Several processes as one run, on JAX's own runtime: a process that dies ends the others instead of hanging them."""

import json
import os
import sys
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as dead.
HEARTBEAT_TIMEOUT = 30
# What jax.distributed says where it recognises no cluster and was told of none.
NO_CLUSTER = "coordinator_address should be defined"


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Join the other processes of the run. Call it first: before anything asks JAX for a device.

    Without arguments Cloud TPU, GKE, Slurm and Open MPI are recognised; elsewhere the run stays one process.

    When a process dies, JAX aborts the others and names it ("The following tasks are unhealthy"): within
    `heartbeat_timeout_seconds` and a few more, at once where it was process 0. Where a collective loses its connection
    before that, as on CPUs, it raises. A process that stops with an exception exits with code 1 at once, without
    waiting for the others. Start all of them again: they go on from the newest checkpoint.

    Args:
        coordinator_address: "host:port" of process 0, with a free port.
        num_processes: How many there are.
        process_id: Which this one is, from 0.
        heartbeat_timeout_seconds: After which a silent process counts as dead.

    Raises:
        RuntimeError: When JAX has devices already or joined before, and what else `jax.distributed.initialize` raises.
    """
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout_seconds
        )
    except ValueError as error:
        told = (coordinator_address, num_processes, process_id) != (None, None, None)
        if told or NO_CLUSTER not in str(error):
            raise
        return
    if jax.process_count() > 1:
        _exit_at_errors(heartbeat_timeout_seconds)


def all_gather(value: Any) -> list[Any]:
    """The JSON values that the processes give, in their order; all processes call it, and get all values."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def leave(code: int) -> NoReturn:
    """End this process with this exit code at once.

    What JAX does at exit is skipped: it waits minutes for the others, who wait for this process.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_at_errors(timeout: int) -> None:
    shown, where = sys.excepthook, f"process {jax.process_index()} of {jax.process_count()}"

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        print(
            f"{where} stops at the error above; the others are aborted within about {timeout} seconds. Where it says "
            "that a connection was lost, another process died first: see its log. Then start all of them again: the "
            "run goes on from its newest checkpoint.",
            file=sys.stderr,
        )
        leave(1)

    sys.excepthook = hook
