"""Tests run on the CPU unless the caller says otherwise."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What commands keep in the user's cache is gone after the tests; workers inherit the folder.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sysdpo_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# After the variables that they read.
import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Compiled programs go with the tests that needed them: thousands take all memory maps that a process may have."""
    yield
    jax.clear_caches()
    gc.collect()
