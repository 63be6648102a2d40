"""How a step is compiled: it rounds where its program says, and `remat: auto` is the fastest setting that fits."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sysdpo_jax.models.remat import WHOLE
from sysdpo_jax.parallel.distributed import all_gather

# Of every program that evaluates a policy or a reference. By default a compiler may leave out a rounding to bfloat16
# between operations that it joins; which it joins differs between a forward pass whose results the backward pass needs
# and one whose results it does not, and so would policy and reference at the first step.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

# What "auto" tries, the fastest first. On an H100 Llama-3.2-1B, 8 pairs of 1024 tokens, takes 44.4 thousand tokens a
# second with dense layers' results kept (34 GiB), 41.3 under full (25 GiB) and 40.8 with all kept (66 GiB); on two
# cores a decoder of 8 layers takes 0.38, 0.37 and 0.47 s, a U-Net 0.22, 0.20 and 0.24 s. What is cheap to compute costs
# more to write, to copy into the stacks of a scan and to read again: None is both slower and larger.
CANDIDATES: tuple[str, ...] = ("products_saveable", "full")
# Of several trained nodes also this, under which the activations of one at a time are in memory, for another forward
# pass of each: with one node it saves nothing.
OF_SEVERAL = (*CANDIDATES, WHOLE)

# Of a device's memory, left for fragments and for programs that run between the steps.
MARGIN = 0.05
GIB = 2**30
# Where Linux says what a container may take (cgroup version 2).
CONTAINER = Path("/sys/fs/cgroup")


class Attempt(NamedTuple):
    """A setting of `remat` and the bytes that the step needs under it; None where the compiler finds no room for it."""

    setting: str
    bytes: int | None


class Decision(NamedTuple):
    """What "auto" became, of what was tried, where the step may take `limit` bytes of a device; str() is a line."""

    setting: str
    tried: tuple[Attempt, ...]
    limit: int
    fits: bool

    def __str__(self) -> str:
        said = ", ".join(f"{setting} {_bytes(size)}" for setting, size in self.tried)
        verdict = "the fastest that fits" if self.fits else "the smallest, though it may not fit"
        return f"remat auto: {self.setting}, {verdict} the {_bytes(self.limit)} for it of a device: {said}"


def fastest_that_fits(
    candidates: Sequence[str],
    compiled_as: Callable[[str], jax.stages.Compiled],
    limit_of: Callable[[jax.stages.Compiled], int],
    platform: str,
) -> Decision:
    """Compile a step under one setting after the other until one fits; all processes must call it, and decide alike.

    Args:
        candidates: Settings of `remat`, the fastest first.
        compiled_as: Compiles the step under one of them.
        limit_of: The bytes that a program may take on a device.
        platform: Of the devices.

    Returns:
        The first setting that fits on every process or, where none does, the one that needs least.

    Raises:
        jax.errors.JaxRuntimeError: Where the compiler has room for none of them.
    """
    tried, limit = list[Attempt](), 0
    refusal: Exception | None = None
    for setting in candidates:
        own: tuple[int, int] | None = None
        try:
            compiled = compiled_as(setting)
            own = peak_bytes(compiled, platform), limit_of(compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = error
        everywhere = all_gather(own)
        if None in everywhere:
            tried.append(Attempt(setting, None))
            continue
        # Of the process with least to spare.
        needed, limit = max(everywhere, key=lambda bytes_: bytes_[0] - bytes_[1])
        tried.append(Attempt(setting, needed))
        if needed <= limit:
            return Decision(setting, tuple(tried), limit, True)
    sizes = {setting: size for setting, size in tried if size is not None}
    if not sizes:
        raise refusal if refusal is not None else RuntimeError("another process has no room for the step: see its log")
    return Decision(min(sizes, key=sizes.__getitem__), tuple(tried), limit, False)


def peak_bytes(compiled: jax.stages.Compiled, platform: str) -> int:
    """What a program takes of a device's memory while it runs, arguments included."""
    memory: Any = compiled.memory_analysis()
    # Other compilers than the TPU's state a peak without the buffers that they lay out themselves.
    return int(memory.peak_memory_in_bytes) if platform == "tpu" else _laid_out(memory)


def room(compiled: jax.stages.Compiled, mesh: Mesh) -> int:
    """The bytes that the program may take: what is free of this process's fullest device, and its arguments, which lie
    there already. Of processors that share one memory each has its part."""
    arguments: Any = compiled.memory_analysis()
    free = min(map(_free_bytes, mesh.local_devices))
    return free + int(arguments.argument_size_in_bytes)


def _laid_out(memory: Any) -> int:
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return int(memory.argument_size_in_bytes + new + memory.generated_code_size_in_bytes)


def _free_bytes(device: Any) -> int:
    if device.platform == "cpu":
        return int(_available() * (1 - MARGIN)) // device.client.local_device_count()
    # An allocator that counts nothing has nothing to promise: the smallest program is taken.
    stats = device.memory_stats() or {"bytes_limit": 0, "bytes_in_use": 0}
    return int(stats["bytes_limit"] * (1 - MARGIN)) - int(stats["bytes_in_use"])


def _available() -> int:
    """Bytes of this machine that programs may take, without its swap; where it does not say, all it has.

    In a container at most what is left of its own limit.
    """
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    known = {name: size.split() for name, _, size in (line.partition(":") for line in lines)}
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if "MemAvailable" in known:
        free = int(known["MemAvailable"][0]) * 1024
    limit, used = (CONTAINER / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _bytes(size: int | None) -> str:
    if size is None:
        return "refused by the compiler"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
