"""Compiled programs are kept where they should be, and taken from there by the next process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sysdpo_jax.runs.caches import keep_compilations

ROOT = Path(__file__).parents[2]
# Trains in a folder and prints how many programs JAX took from the cache, and how many it compiled.
TRAINING = """
import json, sys, jax
from sysdpo_jax.cli.main import dispatch
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
dispatch(["train", "quickstart", "--directory", sys.argv[1], "--compilation_cache", sys.argv[2], *sys.argv[3:]])
print(json.dumps([events.count("cache_hits"), events.count("cache_misses")]))
"""
# Prints where programs are kept and how many of them JAX took from there.
PROGRAM = """
import json, sys, jax
from sysdpo_jax.runs.caches import keep_compilations
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
keep_compilations(sys.argv[1])
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64)))
print(json.dumps([jax.config.jax_compilation_cache_dir, len(hits)]))
"""


def compiled(where, **environment):
    """Where a process keeps its programs, and how many it found there."""
    # Without the tests' own cache.
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, where], env=inherited | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_users_cache_is_taken_by_the_next_process(tmp_path):
    folder, hits = compiled("user", XDG_CACHE_HOME=str(tmp_path))
    assert Path(folder).is_relative_to(tmp_path / "sysdpo_jax" / "compiled")
    assert hits == 0
    assert any(Path(folder).iterdir())
    assert compiled("user", XDG_CACHE_HOME=str(tmp_path))[1] > 0


def test_jaxs_own_setting_goes_before(tmp_path):
    folder, _ = compiled("user", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), XDG_CACHE_HOME=str(tmp_path / "not"))
    assert folder == str(tmp_path / "mine")
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_a_second_start_of_a_training_compiles_nothing(tmp_path):
    """No program has anything in it that the next process or another folder would not have."""
    away = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in away}
    # So that every program counts, whatever a busy machine takes for it.
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path / "user")}
    settings = ["--schedule.steps", "3", "--schedule.warmup", "1", "--evaluation.samples", "2"]

    def trained(name):
        folders = [str(tmp_path / name), str(tmp_path / "compiled")]
        run = subprocess.run(
            [sys.executable, "-c", TRAINING, *folders, *settings], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    _, misses = trained("first")
    assert misses > 10
    again, compiled = trained("second")
    assert compiled == 0
    assert again >= misses


@pytest.fixture
def kept(monkeypatch):
    """JAX's settings are put back."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("kept")
def test_a_folder_none_and_one_that_cannot_be_made(tmp_path, caplog):
    keep_compilations(str(tmp_path / "run" / "compiled"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
    # What draws parameters takes less than JAX's second each.
    assert jax.config.jax_persistent_cache_min_compile_time_secs <= 0.1
    keep_compilations("none")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
    (tmp_path / "file").write_text("")
    keep_compilations(str(tmp_path / "file" / "compiled"))
    assert "compiled programs are not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
