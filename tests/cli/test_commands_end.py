"""A command has its output for itself, and its process ends with the code that it says."""

import runpy
import subprocess
import sys
from contextlib import contextmanager

import pytest

from experiments.common.command import experiment_folder
from experiments.progressive.align import AlignConfig
from sysdpo_jax.cli import pairs as make_pairs
from sysdpo_jax.cli import rollout, score
from tests.cli.test_runs import failure
from tests.test_locks import held


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (rollout, ["--system", "none.yaml", "--prompts", "none.txt"]),
        (score, ["--runs", "none.jsonl", "--scorer", "builtins:len"]),
        (make_pairs, ["--runs", "none.jsonl", "--scores", "none.jsonl"]),
    ],
)
def test_an_output_that_another_process_writes_is_refused(tmp_path, capsys, command, flags):
    output = tmp_path / "out.jsonl"
    with held("locked_file", output) as process:
        said = failure(capsys, command.main, [*flags, "--output", str(output)])
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


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise SystemExit(7)", 7), ("raise KeyError", 1)])
def test_a_thread_that_hangs_does_not_hold_up_the_end(ending, code):
    """As the threads of wandb do where there is no network."""
    script = f"""
import threading, time
from sysdpo_jax.cli import ending as command
command.EXIT = 0.5
with command.bounded_exit():
    threading.Thread(target=time.sleep, args=(1e6,)).start()
    {ending}
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert ended.returncode == code
    assert "something in the background does not end" in ended.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["train", "rollout", "score", "export"])
def test_commands_that_call_users_code_end_within_bounds(monkeypatch, capsys, name):
    entered = []

    @contextmanager
    def noted():
        entered.append(name)
        yield

    monkeypatch.setattr("sysdpo_jax.cli.ending.bounded_exit", noted)
    monkeypatch.setattr("sysdpo_jax.initialize", lambda: None)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert entered == [name]
