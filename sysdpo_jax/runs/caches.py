"""What is kept on disk between commands: compiled programs, so that none compiles for minutes, and preferences."""

import hashlib
import logging
import os
import platform
import shutil
import time
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from sysdpo_jax.io import user_cache

logger = logging.getLogger(__name__)

# Beyond them the programs that were not used for longest are dropped.
MAX_BYTES = 10 * 2**30
# JAX's own bound of a second leaves out what draws parameters and most of what runs once, which is much together. What
# takes less than this is as soon compiled as kept.
MIN_SECONDS = 0.1
# Days after which prepared preferences are dropped that no command has used.
MAX_DAYS = 30


def keep_compilations(where: str) -> None:
    """Keep what takes `MIN_SECONDS` or more to compile, and take what is kept. JAX's own settings go before.

    Commands call it; a script of one's own may, before it computes anything.

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
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX looks at the folder once, at its first compilation.
    compilation_cache.reset_cache()


def _user_folder() -> Path:
    """A folder for each kind of processor: programs for CPUs use the instructions of the one they were compiled on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(features.encode()).hexdigest()[:8]
    return user_cache() / "compiled" / f"{platform.machine()}-{kind}"


def prepared_folder(where: str, directory: Path) -> Path | None:
    """Where prepared preferences are kept; None for nowhere, with a warning, where the user's cache cannot be written.

    Args:
        where: "user" for the user's cache, where all runs share them, or a folder.
        directory: Of the run: several processes share it, and it is theirs in the place of the user's cache.
    """
    if where in ("", "none"):
        raise ValueError(f"prepared_cache is {where!r}: give user or a folder")
    if where != "user":
        return Path(where)
    if jax.process_count() > 1:
        return directory / "prepared"
    try:
        folder = user_cache() / "prepared"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        logger.warning("prepared preferences are not kept: the user's cache cannot be made (%s)", error)
        return None
    for unused in folder.iterdir():
        if unused.is_dir() and time.time() - unused.stat().st_mtime > MAX_DAYS * 24 * 3600:
            shutil.rmtree(unused, ignore_errors=True)
    return folder
