"""Two processes search for intermediates, and evaluate, as one process does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from sysdpo_jax.columns import as_values, load_columns
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.training import read_metrics
from tests.pretrained.checkpoints import write_decoder

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What `python -m sysdpo_jax.cli.train` does, where no cluster says who the other processes are.
TRAIN = """
import sys
import sysdpo_jax as sj
from sysdpo_jax.cli import train
number, port, process, *flags = sys.argv[1:]
if number != "1":
    sj.initialize(f"127.0.0.1:{port}", int(number), int(process), heartbeat_timeout_seconds=10)
train.main(flags)
"""
WORDS = ("a", "red", "green", "ball", "cube", "small", "large", "on", "the", "left")


def started(number, command, last=()):
    """(exit code, standard output, standard error) of each of `number` processes of 4 devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={4 // number} --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (*command, number, port, process, *last))],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(number)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def finished(number, command, last=()):
    """What each of the processes printed."""
    ended = started(number, command, last)
    assert [code for code, _, _ in ended] == [0] * number, "\n".join(said[-3000:] for _, _, said in ended)
    return [printed for _, printed, _ in ended]


def losses(directory):
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]


def drawn(directory, step):
    """{record: its sets} of all files of a step."""
    found = {}
    for path in (directory / "intermediates").glob(f"{step:08d}*.npz"):
        columns = {name: as_values(column) for name, column in load_columns(path).items()}
        texts = iter(columns["draft"])
        for row, count in zip(columns["rows of records"], columns["sets of each row"], strict=True):
            found[row] = [next(texts) for _ in range(count)]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    finished(1, ["-m", "tests.distributed.sampled_run", directory, 6])
    return directory


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Two processes, up to a step between two draws, and what they printed."""
    directory = tmp_path_factory.mktemp("half")
    return directory, finished(2, ["-m", "tests.distributed.sampled_run", directory, 3])


def test_parameters_come_whole_to_the_devices_of_each_process(half):
    """An embedding of 14 words x 32, cut as the mesh cuts it as far as two devices of a process go.

    Four parts do not divide its words, so that it lies whole on every device already.
    """
    parts = {
        "fsdp": [14, 16],
        "data": [14, 32],
        "pairs": [14, 16],
        "tensor": [7, 32],
        "all tensor": [14, 32],
        "by turns": [14, 16],
    }
    for printed in half[1]:
        found = json.loads(printed.splitlines()[-1])
        assert found == {name: {"same": True, "own": True, "part": part, "again": True} for name, part in parts.items()}


@pytest.mark.parametrize("number", [1, 2])
def test_what_two_processes_drew_is_gone_on_with(alone, half, tmp_path, number):
    """1e-5: the devices add in another order, in float32, and Adam carries the difference on."""
    directory = shutil.copytree(half[0], tmp_path / "run")
    assert sorted(path.name for path in (directory / "intermediates").iterdir()) == [
        f"00000002-0000{process}-of-00002.npz" for process in (1, 2)
    ]
    finished(number, ["-m", "tests.distributed.sampled_run", directory, 6])
    whole = losses(alone)
    assert whole[0] - whole[-1] > 0.1  # it trains, so the drafts matter
    np.testing.assert_allclose(losses(directory), whole, rtol=0, atol=1e-5)
    assert len(list((directory / "intermediates").glob("00000004*"))) == number
    for step in (2, 4):
        assert drawn(directory, step) == drawn(alone, step)
        assert len(drawn(alone, step)) == 16


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_decoder(folder / "writer", "llama", num_hidden_layers=1)
    rng = np.random.default_rng(0)
    rows = [
        {"inputs": {"x": " ".join(rng.choice(WORDS, 3))}, "chosen": {"answer": "red"}, "rejected": {"answer": "the"}}
        for _ in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"{' '.join(rng.choice(WORDS, 3))}\n" for _ in range(5)))
    writer = {
        "checkpoint": str(folder / "writer"),
        "mode": "full",
        "settings": {"max_prompt_length": 16, "max_new_tokens": 8},
    }
    config = {
        "system": {
            "inputs": ["x"],
            "nodes": {
                "draft": {"component": "drafter", "parents": ["x"]},
                "answer": {"component": "refiner", "parents": ["draft"], "prompt": "the {draft}"},
            },
            "components": {"drafter": writer, "refiner": writer},
        },
        "data": {"source": str(folder / "pairs.jsonl")},
        "objective": {"kind": "sampling", "intermediates": 2},
        "schedule": {"steps": 2, "batch_size": 8, "warmup": 1, "learning_rate": 1e-2},
        "evaluation": {
            "prompts": str(folder / "prompts.txt"),
            "scorer": "tests.distributed.sampled_run:red",
            "every": 2,
            "samples": 3,
            "batch_size": 4,
        },
        "log_every": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_two_processes_evaluate_as_one_does(material):
    """Of 4 batches each process has 2; runs of a prompt lie in two of them."""
    found = {}
    for number in (1, 2):
        directory = material / f"run{number}"
        finished(number, ["-c", TRAIN], ["--config", material / "run.yaml", "--directory", directory])
        assert (directory / "report.html").exists()
        rows = [row for row in read_metrics(directory / "metrics.jsonl") if "eval/score" in row]
        figures = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in rows]
        runs = [list(read_lines(path)) for path in sorted((directory / "evaluation").glob("*.jsonl"))]
        found[number] = figures, runs, losses(directory)
    assert [len(runs) for runs in found[1][1]] == [15, 15]
    assert found[1][1][0] != found[1][1][1]  # it trains
    assert found[2][1] == found[1][1]
    # Figures travel between processes in float32.
    assert found[2][0] == [pytest.approx(figures, rel=1e-6) for figures in found[1][0]]
    np.testing.assert_allclose(found[2][2], found[1][2], rtol=0, atol=1e-5)


def test_a_scorer_that_fails_in_one_process_ends_both(material, tmp_path):
    flags = ["--config", material / "run.yaml", "--directory", tmp_path / "run"]
    scorer = "tests.distributed.sampled_run:red_on_process_0"
    ended = started(2, ["-c", TRAIN], [*flags, "--evaluation.scorer", scorer])
    assert ended[1][0] == 1
    assert "the score of run 1-1 is 'no score', no number: fix the scorer" in ended[1][2]
    assert ended[0][0] != 0
