"""Tests run on the CPU unless the caller says otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
