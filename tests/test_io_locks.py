"""One writer for a folder or a file: another is refused by name, and a dead one leaves nothing that must be fixed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from sysdpo_jax import io
from sysdpo_jax.io import InUseError, locked_file, locked_folder

# Takes a lock, says so, and keeps it until it is told to go.
HOLDER = """
import pathlib, sys
from sysdpo_jax import io
with getattr(io, sys.argv[1])(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(kind, path):
    """Another process that has it."""
    command = [sys.executable, "-c", HOLDER, kind, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate("go\n")
            assert process.returncode == 0


KINDS = pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [("locked_folder", "runs/a", "another directory"), ("locked_file", "out/runs.jsonl", "another output")],
)


@KINDS
def test_another_process_is_refused_and_told_whose_it_is(tmp_path, kind, name, remedy):
    path = tmp_path / name
    with held(kind, path) as process:
        with pytest.raises(InUseError) as caught, getattr(io, kind)(path):
            pass
        said = str(caught.value)
    begin = f"{path} is in use by process {process.pid} on host {socket.gethostname()} since 20"
    assert said.startswith(begin)
    assert said.endswith(f": wait for it or choose {remedy}")
    # It has left, and all that it made with it.
    assert list(tmp_path.iterdir()) == []
    with getattr(io, kind)(path):
        pass


@KINDS
def test_what_a_killed_process_held_is_free_at_once(tmp_path, kind, name, remedy):
    path = tmp_path / name
    with held(kind, path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = next(path for path in tmp_path.rglob("*.json"))
    assert json.loads(left.read_text())["process"] == process.pid
    with getattr(io, kind)(path):
        assert json.loads(left.read_text())["process"] == os.getpid()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path):
    found = []

    def other():
        try:
            with locked_folder(tmp_path):
                found.append("had it")
        except InUseError as error:
            found.append(str(error))

    with locked_folder(tmp_path):
        with locked_folder(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert f"in use by process {os.getpid()}" in found[0]
    other()
    assert found[1] == "had it"


def test_a_new_folder_stays_if_something_is_in_it(tmp_path):
    with pytest.raises(KeyError), locked_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]
    (tmp_path / "empty").mkdir()
    with locked_file(tmp_path / "empty" / "runs.jsonl"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_holder_that_cannot_be_named_is_another_process(tmp_path):
    with held("locked_folder", tmp_path):
        (tmp_path / ".lock.json").write_text("{")
        with pytest.raises(InUseError, match="in use by another process: wait"), locked_folder(tmp_path):
            pass


def test_a_place_that_cannot_be_locked_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InUseError, match="file is a file: choose another directory"), locked_folder(tmp_path / "file"):
        pass
    with (
        pytest.raises(InUseError, match=r"cannot be made \(Not a directory\): choose"),
        locked_file(tmp_path / "file" / "runs" / "a.jsonl"),
    ):
        pass

    def without_locks(self, *args, **settings):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", without_locks)
    with (
        pytest.raises(InUseError, match=r"cannot be locked \(No locks available\): choose another output"),
        locked_file(tmp_path / "runs.jsonl"),
    ):
        pass


def test_what_the_block_raises_is_left_as_it_is(tmp_path):
    with pytest.raises(FileExistsError, match="own"), locked_folder(tmp_path / "new"):
        raise FileExistsError("own")
    with pytest.raises(OSError, match="disk") as caught, locked_file(tmp_path / "new" / "a"):
        raise OSError(errno.ENOSPC, "disk")
    assert not isinstance(caught.value, InUseError)
    assert list(Path(tmp_path).iterdir()) == []
