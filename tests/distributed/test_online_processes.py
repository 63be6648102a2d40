"""Two processes make the runs, the pairs and the rounds of one, and go on together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def run(directory, rounds, count):
    """What each process printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "tests.distributed.online_run", str(directory), str(rounds), str(port), str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(err[-3000:] for _, err in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_two_processes_make_the_rounds_of_one(tmp_path):
    """The same runs and scores, byte for byte; training adds up in another order, so that rounding may differ."""
    [alone] = run(tmp_path / "one", 1, 1)
    together = run(tmp_path / "two", 1, 2)
    assert together[0] == together[1]
    assert together[0][:2] == alone[:2]
    first = [(tmp_path / name / "round-1" / "runs.jsonl").read_text() for name in ("one", "two")]
    assert first[0] == first[1]
    for one, other in zip(alone[2], together[0][2], strict=True):
        # Float32 through 10 steps of Adam.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    more = run(tmp_path / "two", 2, 2)
    assert more[0] == more[1]
    assert [each[:2] for each in more[0][1]] == [[0, 10], [10, 20]]
    # All is done: what is there is restored.
    assert run(tmp_path / "two", 2, 2) == more
