"""Two processes of 4 virtual devices train as one process of 8 does, and end together, whatever ends one of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sysdpo_jax.parallel import distributed
from sysdpo_jax.training import read_metrics
from tests.distributed.two_processes import HEARTBEAT, PROCESSES, ROWS

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, LONG = 8, 2_000
UNHEALTHY = "The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
# Seconds until a run has compiled and trains; as long as that on a machine with much else to do.
START = 400
# Seconds beyond the heartbeat within which a process must have noticed that another is dead; the machine may be busy.
GRACE = 30


@dataclass
class Run:
    """Processes of one run in a directory; what they print is in log-<process>."""

    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, cache: Path, number: int, steps: int, pause: float = 0.0, bad: int | None = None) -> "Run":
        self.directory.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Level 0 compiles in half the time and keeps every collective.
        flags = f"--xla_force_host_platform_device_count={8 // number} --xla_backend_optimization_level=0"
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        command = [sys.executable, "-W", "error", "-m", "tests.distributed.two_processes"]
        command += [str(self.directory), str(steps), str(pause)]
        for process in range(number):
            own = [str(port), str(process)] if number > 1 else []
            own += [str(bad)] if bad is not None and process == 1 else []
            with self.log(process).open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *own], cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        return self

    def log(self, process: int) -> Path:
        return self.directory / f"log-{process}"

    def text(self, process: int) -> str:
        return self.log(process).read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Until process 0 has printed that so many steps are done."""
        deadline = time.monotonic() + START
        while str(step) not in self.text(0).splitlines():
            assert all(process.poll() is None for process in self.processes), (
                self.text(0)[-2000:] + self.text(1)[-2000:]
            )
            assert time.monotonic() < deadline, self.text(0)[-2000:]
            time.sleep(0.05)

    def codes(self, timeout: float) -> list[int]:
        """Exit codes once all have ended; a process that hangs is an error."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def finished(self) -> "Run":
        codes = self.codes(START)
        assert codes == [0] * len(codes), "\n".join(self.text(i)[-3000:] for i in range(len(codes)))
        return self


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(directory, processes, steps, ...)` a run; what is left of the one before, of a failed test, is ended."""
    cache, runs = tmp_path_factory.mktemp("cache"), []

    def begin(directory: Path, *args: Any, **settings: Any) -> Run:
        for run in runs:
            run.end()
        runs.append(Run(directory))
        return runs[-1].start(cache, *args, **settings)

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def one(tmp_path_factory, start):
    return start(tmp_path_factory.mktemp("one"), 1, STEPS).finished().directory


@pytest.fixture(scope="module")
def two(tmp_path_factory, start):
    return start(tmp_path_factory.mktemp("two"), PROCESSES, STEPS).finished().directory


def losses(directory):
    return np.array([row["loss"] for row in read_metrics(directory / "metrics.jsonl")])


def arrays(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def test_losses_are_those_of_one_process(one, two):
    """1e-5 over 8 steps: the processes add in another order, in float32, and Adam carries the difference on."""
    assert losses(one)[0] == pytest.approx(np.log(2), abs=1e-5)
    assert np.ptp(losses(one)) > 0.01  # it trains, so parameters, rows and noise matter
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)


def test_parameters_on_both_processes_move_to_another_mesh(two):
    assert [json.loads((two / f"moved-{process}.json").read_text()) for process in range(PROCESSES)] == [True] * 2


def test_each_process_read_every_record_once(two):
    """A list is prepared by each process, before the first step, and never read again."""
    for process in range(PROCESSES):
        assert json.loads((two / f"rows-{process}.json").read_text()) == list(range(ROWS))


def test_one_process_writes_the_metrics(two):
    assert [row["step"] for row in read_metrics(two / "metrics.jsonl")] == list(range(STEPS))
    assert len(list(two.glob("events.out.tfevents*"))) == 1


def test_one_process_alone_restores_the_checkpoint_bit_for_bit(two, start, tmp_path):
    """On one device, what was cut over eight."""
    final = [arrays(two / f"final-{process}.npz") for process in range(PROCESSES)]
    copy = shutil.copytree(two, tmp_path / "copy")
    start(copy, 1, STEPS).finished()
    restored = arrays(copy / "restored.npz")
    assert len(restored) > 20
    for ours, *theirs in zip(restored, *final, strict=True):
        assert [array.tobytes() for array in theirs] == [ours.tobytes()] * PROCESSES


def test_shards_are_the_rows_that_a_process_has_devices_for(two):
    """Sixteen rows are numbered 0 ... 15; a placed batch is read back whole."""
    rows = list(range(16))
    turns = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    for process in range(PROCESSES):
        found = json.loads((two / f"placing-{process}.json").read_text())
        for mesh in ("data", "fsdp", "pairs", "copies"):
            assert found[mesh] == [process, 2, rows]
        assert found["tensor"] == [0, 1, rows]
        assert found["by turns"] == [process, 2, turns]
        assert "4 parts of a batch (data x fsdp) fall on the processes as [(0, 1, 2), (0, 2, 3)]" in found["torn"]
        assert found["whole"] == (
            "batch leaf 'x' of shape [15, 2] must have a multiple of 4 rows (data x fsdp / 2 blocks: pass this "
            "process's rows only)"
        )
        assert found["torn rows"].startswith("batch leaf 'x' of shape [3, 2] must have")
    alone = [json.loads((two / f"placing-{process}.json").read_text())["one process"] for process in range(PROCESSES)]
    assert alone[0] == [0, 1]
    assert "process 1 has no device on the mesh" in alone[1]


def test_without_a_cluster_there_is_one_process():
    """In a process of its own: the tests' one has devices already, which makes jax.distributed refuse."""
    code = (
        "import jax; from sysdpo_jax.parallel import distributed; distributed.initialize(); "
        "assert jax.process_count() == 1 and not jax.distributed.is_initialized()\n"
        "try: distributed.initialize(num_processes=2)\n"
        "except (ValueError, RuntimeError) as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_"))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "must be called before" in run.stdout or distributed.NO_CLUSTER in run.stdout


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_clear_error(tmp_path, start, killed):
    run = start(tmp_path / "run", PROCESSES, LONG, pause=0.01)
    run.wait_for_step(8)  # the checkpoint of step 3 is complete when that of step 6 begins
    run.processes[killed].send_signal(signal.SIGKILL)
    at = time.monotonic()
    codes = run.codes(HEARTBEAT + GRACE)
    print(f"the other process ended {time.monotonic() - at:.1f} s after the kill")
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, -signal.SIGKILL)
    # What notices first: JAX's service, or a collective that lost its connection.
    found = {0: "Either the leader task was preempted/died/restarted unexpectedly", 1: UNHEALTHY}[killed]
    text = run.text(1 - killed)
    assert found in text or f"process {1 - killed} of 2 stops at the error above" in text
    # Started again, they go on.
    saved = max(int(path.name) for path in (run.directory / "checkpoints").iterdir() if path.name.isdigit())
    assert saved >= 3
    again = start(run.directory, PROCESSES, saved + 3).finished()
    assert [row["step"] for row in read_metrics(again.directory / "metrics.jsonl")] == list(range(saved + 3))


def test_an_exception_in_one_process_ends_both(tmp_path, start):
    run = start(tmp_path / "run", PROCESSES, LONG, bad=5)
    run.wait_for_step(1)
    codes = run.codes(60 + HEARTBEAT + GRACE)
    assert codes[1] == 1
    assert codes[0] not in (0, -signal.SIGKILL)
    assert "the disk of step 5 is away" in run.text(1)
    assert "process 1 of 2 stops at the error above; the others are aborted within about 10 seconds" in run.text(1)
    assert UNHEALTHY in run.text(0) or "process 0 of 2 stops at the error above" in run.text(0)


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_process_saves_and_ends_both_at_one_step(tmp_path, start, asked):
    run = start(tmp_path / "run", PROCESSES, LONG, pause=0.01)
    run.wait_for_step(4)
    run.processes[asked].send_signal(signal.SIGTERM)
    assert run.codes(60) == [0, 0], run.text(0)[-3000:] + run.text(1)[-3000:]
    saved = max(int(path.name) for path in (run.directory / "checkpoints").iterdir() if path.name.isdigit())
    assert 4 <= saved < LONG
    assert f"asked to stop: step {saved} is saved" in run.text(0)
    assert [row["step"] for row in read_metrics(run.directory / "metrics.jsonl")] == list(range(saved))
