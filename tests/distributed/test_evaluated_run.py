"""Two processes evaluate the same steps and stop at the same one, by the figures of process 0."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sysdpo_jax.training import read_metrics

ROOT = Path(__file__).parents[2]


def run(directory):
    """What each of the processes printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "tests.distributed.evaluated_run", str(directory), str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err[-3000:] for _, err in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended], ended[0][1]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_evaluation(tmp_path):
    found, _ = run(tmp_path)
    assert found == [[[0, 2, 3], 3, 2]] * 2
    found, said = run(tmp_path)
    # At step 3 and at step 4 it was no better than at 2.
    assert found == [[[4], 4, 2]] * 2
    assert "training ends at step 4: eval/score was 0.7 at step 2" in said
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "eval/score" in row]
    assert [row["step"] for row in rows] == [0, 2, 3, 4]
    assert [row["eval/score"] for row in rows] == pytest.approx([0.1, 0.7, 0.6, 0.3])
    assert {row["eval/of process"] for row in rows} == {0.0}
