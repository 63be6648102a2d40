"""Compiled programs on disk: a command that is given again does not compile for minutes."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

# Beyond them the programs that were not used for longest are dropped.
MAX_BYTES = 10 * 2**30


def keep_compilations(where: str) -> None:
    """Keep what takes a second or more to compile, and take what is kept. A cache of JAX's own settings goes before.

    Args:
        where: "user" for the user's cache ($XDG_CACHE_HOME, ~/.cache by default), which all runs share; "none"; or a
            folder, of a run for example. One that cannot be written is warned of, and nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or where == "none":
        return
    if not where:
        raise ValueError("compilation_cache is empty: give user, none or a folder")
    try:
        folder = _user_folder() if where == "user" else Path(where).absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # RuntimeError: a user without a home.
        logger.warning("compiled programs are not kept: %s cannot be made (%s)", where, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # JAX looks at the folder once, at its first compilation.
    compilation_cache.reset_cache()


def _user_folder() -> Path:
    """A folder for each kind of processor: programs for CPUs use the instructions of the one they were compiled on."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(features.encode()).hexdigest()[:8]
    return base / "sysdpo_jax" / "compiled" / f"{platform.machine()}-{kind}"
