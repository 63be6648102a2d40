"""Online rounds that are killed at random moments and started again end as rounds that were not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sysdpo_jax.training import read_metrics

ROOT = Path(__file__).parents[2]
SCORED = 3 * 64 + 4 * 16


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The same compiled programs for all starts."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | cache


def start(environment, folder):
    command = [sys.executable, "-m", "tests.runs.killed_online", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finished(environment, folder):
    """How many runs it scored."""
    run = start(environment, folder)
    text, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors[-3000:]
    return text.count("scored")


def rows_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("throughput/", "memory/"))} for row in rows]


@pytest.mark.slow
def test_killed_anywhere_and_started_again(environment, tmp_path):
    """A kill may lose the one score that was on its way to the file, and nothing else that was paid for."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert finished(environment, whole) == SCORED
    took, seed, scored, kills = time.monotonic() - began, random.randrange(2**32), 0, 0
    rng = random.Random(seed)
    while kills < 8:
        run = start(environment, killed)
        time.sleep(rng.uniform(0.3, 1.0) * took)
        run.send_signal(signal.SIGKILL)
        scored += run.communicate()[0].count("scored")
        if run.returncode == 0:
            break
        kills += 1
    scored += finished(environment, killed)
    assert SCORED <= scored <= SCORED + kills, f"seed {seed}, {kills} kills"
    with np.load(whole / "final.npz") as one, np.load(killed / "final.npz") as other:
        assert all(one[name].tobytes() == other[name].tobytes() for name in one.files), f"seed {seed}"
    assert (whole / "result.json").read_text() == (killed / "result.json").read_text()
    assert rows_of(whole) == rows_of(killed), f"seed {seed}"
