"""A run that is killed at random moments, or asked to stop, and restarted ends as one that was not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.systems import trained_rows

STEPS = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The same compiled step for all starts, which then take a fraction of the time.

    Kept for them alone: a process that is killed may leave half a program.
    """
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | cache


def start(environment, kind, directory, steps, pause):
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.training.killed_run", kind, str(directory), str(steps), str(pause)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def wait_for_steps(run, number):
    """The steps whose batches were asked for, at least so many."""
    lines = [run.stdout.readline() for _ in range(number)]
    return steps_of("".join(lines))


def steps_of(text):
    return [int(line) for line in text.splitlines()]


def finished(environment, kind, directory, steps):
    run = start(environment, kind, directory, steps, 0.0)
    # Long only on a machine that others keep busy.
    text, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors[-3000:]
    return steps_of(text)


def check_same(left, right, note):
    with np.load(left / "final.npz") as one, np.load(right / "final.npz") as other:
        assert one.files == other.files
        for name in one.files:
            assert one[name].tobytes() == other[name].tobytes(), f"{note}: array {name} differs"
    assert trained_rows(left) == trained_rows(right), note


def kill_and_compare(environment, kind, tmp_path, kills, steps):
    """Kill so many starts at random moments, then finish. Returns how many kills met a checkpoint half-written."""
    seed = random.randrange(2**32)
    rng, note, newest, torn = random.Random(seed), f"seed {seed}", 0, 0
    for number in range(kills):
        run = start(environment, kind, tmp_path / "killed", steps, pause=0.01)
        seen = wait_for_steps(run, rng.randint(1, max(1, steps // (2 * kills))))
        time.sleep(rng.uniform(0, 0.2))
        run.send_signal(signal.SIGKILL)
        text, errors = run.communicate()
        assert run.returncode == -signal.SIGKILL, f"{note}: start {number} ended before it was killed: {errors[-3000:]}"
        # Two older checkpoints may be lost to a kill: one in writing, and the one before it not yet begun.
        assert seen[0] >= newest - 2, note
        newest = max(seen + steps_of(text))
        torn += any("checkpoint-tmp" in path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    last = finished(environment, kind, tmp_path / "killed", steps)
    assert last == list(range(last[0], steps))
    assert newest - 2 <= last[0] <= newest + 1, note
    assert finished(environment, kind, tmp_path / "whole", steps) == list(range(steps))
    check_same(tmp_path / "killed", tmp_path / "whole", note)
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert sorted(left) == [str(steps - 1), str(steps)]
    return torn


def test_killed_and_restarted(environment, tmp_path):
    kill_and_compare(environment, "direct", tmp_path, kills=1, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["direct", "sampling"])
def test_killed_twenty_times(environment, tmp_path, kind):
    torn = kill_and_compare(environment, kind, tmp_path, kills=20, steps=200)
    print(f"{torn} of 20 kills met a checkpoint half-written")
    assert torn > 0


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(environment, tmp_path):
    """Within 30 seconds, as the grace period of a preempted machine is; it takes a fraction of one."""
    run = start(environment, "sampling", tmp_path / "asked", STEPS, pause=0.02)
    seen = wait_for_steps(run, 7)
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    text, errors = run.communicate(timeout=30)
    assert time.monotonic() - asked < 30
    assert run.returncode == 0, errors[-3000:]
    newest = max(seen + steps_of(text))
    assert newest < STEPS - 1
    assert f"asked to stop: step {newest + 1} is saved in {tmp_path / 'asked' / 'checkpoints'}, the same" in errors
    assert not (tmp_path / "asked" / "final.npz").exists()
    assert finished(environment, "sampling", tmp_path / "asked", STEPS) == list(range(newest + 1, STEPS))
    finished(environment, "sampling", tmp_path / "whole", STEPS)
    check_same(tmp_path / "asked", tmp_path / "whole", "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize(("room", "said"), [(200, "does not take the checkpoint of step 1"), (1500, None)])
def test_a_quota_ends_the_run_with_an_error_or_costs_a_side_output(environment, tmp_path, room, said):
    """A checkpoint takes 1.3 MB, the rows of 40 steps far less. room: KiB of a file, which the shell limits."""
    run = [sys.executable, "-m", "tests.training.killed_run", "direct", str(tmp_path), str(STEPS), "0"]
    command = ["bash", "-c", 'ulimit -f "$0" && exec "$@"', str(room), *run]
    settings = {"cwd": ROOT, "env": environment, "text": True, "capture_output": True, "timeout": 120}
    ended = subprocess.run(command, **settings)
    if said is None:
        assert ended.returncode == 0, ended.stderr[-3000:]
    else:
        assert ended.returncode == 1
        assert f"CheckpointWriteError: {tmp_path / 'checkpoints'} {said}" in ended.stderr
