"""A run that is killed at random moments and restarted ends with the parameters of one that was not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

STEPS = 40
ROOT = Path(__file__).parents[2]


def start(directory: Path, pause: float) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.training.killed_run", str(directory), str(STEPS), str(pause)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def steps_of(text: str) -> list[int]:
    return [int(line) for line in text.splitlines()]


def test_killed_and_restarted(tmp_path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    seen = []
    for _ in range(2):
        run = start(tmp_path / "killed", pause=0.03)
        assert run.stdout is not None
        text = "".join(run.stdout.readline() for _ in range(rng.randint(8, 16)))
        time.sleep(rng.uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
        seen += steps_of(text + run.communicate()[0])
        assert run.returncode == -signal.SIGKILL, f"seed {seed}: the run ended before it was killed"
    outputs = {}
    for name in ("killed", "whole"):
        run = start(tmp_path / name, pause=0.0)
        outputs[name] = steps_of(run.communicate(timeout=60)[0])
        assert run.returncode == 0
    assert outputs["whole"] == list(range(STEPS))
    assert outputs["killed"] == list(range(outputs["killed"][0], STEPS))
    assert 3 <= outputs["killed"][0] <= max(seen)  # it went on from a checkpoint, which are made every 3 steps
    with np.load(tmp_path / "killed/final.npz") as killed, np.load(tmp_path / "whole/final.npz") as whole:
        assert killed.files == whole.files
        for name in whole.files:
            assert killed[name].tobytes() == whole[name].tobytes(), f"seed {seed}: array {name} differs"
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("killed", "whole")]
    assert rows[0] == rows[1], f"seed {seed}"
