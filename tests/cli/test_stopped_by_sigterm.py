"""SIGTERM outside of `Trainer.fit`: the command says so in one line, and nothing that it held or half made stays."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import yaml

from sysdpo_jax.cli import rollout, score, train
from sysdpo_jax.cli.ending import user_errors
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.user_code import user_code
from tests.cli.test_ending import configured

LINE = "stopped by SIGTERM: what was finished is kept\n"
SLOW = """
import time

def score(run):
    if run["answer"] == 2:
        print("waits", flush=True)
        time.sleep(100)
    return run["answer"]
"""


def run_files(folder):
    rows = [{"id": f"{n}-0", "inputs": {"question": "a"}, "outputs": {"answer": n}} for n in range(4)]
    (folder / "runs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return ["--runs", str(folder / "runs.jsonl"), "--output", str(folder / "scores.jsonl")]


def test_a_slow_scorer_is_left_and_the_scores_before_it_are_kept(tmp_path):
    (tmp_path / "slow_scorer.py").write_text(SLOW)
    command = [sys.executable, "-m", "sysdpo_jax.cli.score", *run_files(tmp_path), "--scorer", "slow_scorer:score"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **pipes) as process:
        assert process.stdout.readline() == "waits\n"
        assert (tmp_path / ".scores.jsonl.lock").exists()
        # Twice, as some senders do: to the process and to its group.
        process.terminate()
        process.terminate()
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert said.strip() == LINE.strip()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py" and path.name[0] != "_") == [
        "runs.jsonl",
        "scores.jsonl",
        "scores.jsonl.json",
    ]
    assert [row["score"] for row in read_lines(tmp_path / "scores.jsonl")] == [0, 1]


# Held once the signal of a test is sent: a second one, of a thread that is late, would meet the process without a
# handler and end the tests.
SENT = threading.Lock()


@pytest.fixture
def _one_signal():
    SENT.acquire(blocking=False)
    SENT.release()


def terminated(*values):
    """User code in which SIGTERM arrives."""
    if SENT.acquire(blocking=False):
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(60)


def flags_of(folder, **calls):
    """A configuration whose tool is stopped."""
    flags = configured(folder, scorer=None)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["system"]["nodes"]["letters"] |= {"tool": f"{__name__}:terminated"} | calls
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return flags


def rolled(folder, **calls):
    _, path = flags_of(folder, **calls)
    prompts, output = folder / "held.txt", folder / "out" / "runs.jsonl"
    rollout.main(["--system", path, "--prompts", str(prompts), "--output", str(output)])


@pytest.mark.usefixtures("_one_signal")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (lambda folder: score.main([*run_files(folder), "--scorer", f"{__name__}:terminated"]), 143),
        (rolled, 143),
        (lambda folder: rolled(folder, concurrency=2), 143),
        (lambda folder: train.main(flags_of(folder)), 0),
        (lambda folder: train.main([*flags_of(folder), "--preempted-exit-code", "75"]), 75),
    ],
    ids=["scorer", "tool", "tools", "training", "training with a code"],
)
def test_users_code_is_left_and_no_lock_stays(tmp_path, capsys, command, code):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        command(tmp_path)
    assert stop.value.code == code
    assert capsys.readouterr().err.endswith(LINE)
    assert not [path for path in tmp_path.rglob("*") if "lock" in path.name]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def stopped(block):
    with user_errors():
        block()


def test_what_follows_at_once_does_not_disturb_the_end():
    """A second SIGTERM while locks are given back."""
    ended = []

    def block():
        try:
            with user_code("the tool", ValueError):
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            ended.append(True)

    with pytest.raises(SystemExit, match="143"):
        stopped(block)
    assert ended


def test_users_code_that_swallows_it_is_asked_again(monkeypatch):
    monkeypatch.setattr("sysdpo_jax.cli.ending.SAME", 0.0)

    def block():
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        stopped(block)


def test_another_thread_has_no_signals():
    ended = []

    thread = threading.Thread(target=stopped, args=(lambda: ended.append(True),))
    thread.start()
    thread.join()
    assert ended
