"""A command has its output for itself, and its process ends with the code that it says."""

import subprocess
import sys

import pytest

from experiments.common.command import experiment_folder
from experiments.progressive.align import AlignConfig
from sysdpo_jax.cli.main import dispatch
from tests.cli.test_runs import failure
from tests.test_io_locks import held


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("rollout", ["--system", "none.yaml", "--prompts", "none.txt"]),
        ("score", ["--runs", "none.jsonl", "--scorer", "builtins:len"]),
        ("pairs", ["--runs", "none.jsonl", "--scores", "none.jsonl"]),
    ],
)
def test_an_output_that_another_process_writes_is_refused(tmp_path, capsys, command, flags):
    output = tmp_path / "out.jsonl"
    with held("locked_file", output) as process:
        said = failure(capsys, dispatch, [command, *flags, "--output", str(output)])
    assert f"{output} is in use by process {process.pid} on host" in said
    assert said.endswith("wait for it or choose another output")


def test_an_experiments_folder_is_one_commands(tmp_path):
    config = AlignConfig(steps=1)
    with held("locked_folder", tmp_path / "a") as process:
        with (
            pytest.raises(SystemExit, match=f"is in use by process {process.pid}"),
            experiment_folder(tmp_path / "a", config),
        ):
            pass
        assert not (tmp_path / "a" / "config.json").exists()


def test_a_thread_that_hangs_does_not_hold_up_the_end():
    """As the threads of wandb do where there is no network. The three endings have a process each, and one start."""
    script = """
import os, threading, time
from sysdpo_jax.cli import ending as command
command.EXIT = 0.5

def end(raised):
    with command.bounded_exit():
        threading.Thread(target=time.sleep, args=(1e6,)).start()
        if raised is not None:
            raise raised

codes = []
for raised in (None, SystemExit(7), KeyError()):
    child = os.fork()
    if not child:
        end(raised)
        break
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(codes)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert ended.stdout == "[0, 7, 1]\n"
    assert ended.stderr.count("something in the background does not end") == 3
