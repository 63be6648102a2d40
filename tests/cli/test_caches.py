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


@pytest.fixture
def kept(monkeypatch):
    """JAX's settings are put back."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("kept")
def test_a_folder_none_and_one_that_cannot_be_made(tmp_path, caplog):
    keep_compilations(str(tmp_path / "run" / "compiled"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
    keep_compilations("none")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
    (tmp_path / "file").write_text("")
    keep_compilations(str(tmp_path / "file" / "compiled"))
    assert "compiled programs are not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")
