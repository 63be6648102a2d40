"""Tests run on the CPU unless the caller says otherwise; what they compile is kept for each other and the next run."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What commands keep in the user's cache is gone after the tests; workers inherit the folder.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sysdpo_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the commands that tests start inherit it; at 2 GB it begins anew.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if sum(path.stat().st_size for path in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*")) > 2 * 10**9:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])

# After the variables that they read.
import jax
import pytest

# Of the 65,530 that Linux lets a process have.
MOST_MEMORY_MAPS = 30_000


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not walk it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def programs_have_room():
    """Compiled programs, each of which takes several memory maps, go before they have taken too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()
