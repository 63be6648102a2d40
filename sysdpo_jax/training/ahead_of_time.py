"""A training step compiled for devices that are not there, and what the compiler says of their memory."""

import re
import time
from typing import Any

import jax
from jaxtyping import PyTree

from sysdpo_jax.models.attention import compiling_for
from sysdpo_jax.parallel.hlo import collectives_by_kind
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.step import TrainStep

GIB = 2**30


def compile_step(step: TrainStep, state: TrainState, batch: PyTree, usable_gib: float) -> dict[str, Any]:
    """The compiler's account of a step on TPUs.

    Args:
        step: On a mesh of a `topology`'s chips.
        state: Of `abstract_state`.
        batch: The shapes of a batch.
        usable_gib: Of a chip's memory.

    Returns:
        Whether it "fits", and of one chip the memory in GiB and the collective operations or, where it does not, the
        first lines of what the compiler says; and the seconds that it took.
    """
    began = time.monotonic()
    with compiling_for("tpu"):
        lowered = step.lower(state, batch, jax.random.key(0))
    traced, cpu = time.monotonic(), time.process_time()
    compiled, refusal = _compiled(lowered)
    seconds = {
        "trace_and_lower": round(traced - began, 1),
        "compile": round(time.monotonic() - traced, 1),
        "compile_of_all_cores": round(time.process_time() - cpu, 1),
    }
    if compiled is None:
        result: dict[str, Any] = {"fits": False, "compiler": _first_lines(refusal or "")}
    else:
        result = _account(compiled, usable_gib)
    return {"usable_hbm_gib": usable_gib, **result, "seconds": seconds}


def _compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
    """The program, or the compiler's message where it finds no room for it in a chip's memory."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error)


def _account(compiled: jax.stages.Compiled, usable_gib: float) -> dict[str, Any]:
    """Memory of one chip in GiB, the collectives, and the compiler's FLOPs."""
    memory: Any = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    return {
        "fits": memory.peak_memory_in_bytes <= usable_gib * GIB,
        "memory_per_chip_gib": {name: round(size / GIB, 3) for name, size in sizes.items()},
        "collectives_per_chip": _collectives(compiled),
        "compiler_flops_per_chip": (compiled.cost_analysis() or {}).get("flops"),
    }


def _collectives(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """By kind, or why the program cannot be read: JAX does not take back everything that libtpu writes."""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        return {"unreadable": str(error).splitlines()[0][:300]}
    return dict(collectives_by_kind(text))


def _first_lines(message: str) -> str:
    """How much is used of how much, without the list of buffers."""
    return re.split(r"\n\s*\n|Largest program allocations", message, maxsplit=1)[0][:2000]
