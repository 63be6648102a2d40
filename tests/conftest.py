"""Tests run on the CPU unless the caller says otherwise."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What commands keep in the user's cache is gone after the tests; workers inherit the folder.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sysdpo_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
