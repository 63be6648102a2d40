"""Two processes sample the runs of one: each has the whole system, and none waits for the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sysdpo_jax.cli.main import dispatch
from tests.pretrained.checkpoints import write_decoder

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What `sysdpo rollout` does, where no cluster says who the other processes are.
PROGRAM = """
import sys
import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
port, number, process, *flags = sys.argv[1:]
if number != "1":
    sj.initialize(f"127.0.0.1:{port}", int(number), int(process))
dispatch(["rollout", *flags])
"""


def roll_out(folder, system, number):
    """The lines of all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--system", folder / system, "--prompts", folder / "prompts.txt", "--samples", "3", "--chunk", "1"]
    flags += ["--output", folder / f"{system}{number}.jsonl"]
    devices = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (port, number, process, *flags))],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices},
        )
        for process in range(number)
    ]
    assert [process.wait(timeout=400) for process in processes] == [0] * number
    return sorted(line for path in folder.glob(f"{system}{number}*.jsonl") for line in path.read_text().splitlines())


@pytest.mark.parametrize("system", ["run.yaml", "trained"])
def test_two_processes_make_the_runs_of_one(tmp_path, system):
    """Of 5 chunks one process has 3 and the other 2; a model that lay across both would mix their prompts."""
    write_decoder(tmp_path / "writer", "llama", num_hidden_layers=1)
    settings = {"max_prompt_length": 8, "max_new_tokens": 8}
    config = {
        "directory": str(tmp_path / "trained"),
        "system": {
            "inputs": ["request"],
            "nodes": {"caption": {"component": "writer", "parents": ["request"]}},
            "components": {"writer": {"checkpoint": str(tmp_path / "writer"), "settings": settings}},
        },
        "data": {"source": str(tmp_path / "pairs.jsonl"), "reader": "trl"},
        "schedule": {"steps": 1, "batch_size": 2, "warmup": 0, "learning_rate": 0.1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.txt").write_text("a red\nthe cube\na\nthe ball\nthe\n")
    if system == "trained":
        pair = {"prompt": "a red", "chosen": "ball", "rejected": "cube"}
        (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 2)
        dispatch(["train", str(tmp_path / "run.yaml")])
    lines = roll_out(tmp_path, system, 1)
    assert len({json.loads(line)["outputs"]["caption"]["text"] for line in lines}) > 10
    assert roll_out(tmp_path, system, 2) == lines
    assert len(list(tmp_path.glob(f"{system}2-0000?-of-00002.jsonl"))) == 2
