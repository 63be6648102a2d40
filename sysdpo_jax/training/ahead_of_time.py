"""What a step takes before anything runs: what a device holds of every component, and what a compiler says of a step.

The devices need not be there.
"""

import math
import re
import time
from collections import defaultdict
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from sysdpo_jax.components.routed import of_part
from sysdpo_jax.models.attention import compiling_for
from sysdpo_jax.models.remat import choosing
from sysdpo_jax.parallel.hlo import collectives_by_kind
from sysdpo_jax.parallel.sharding import BATCH_SPEC, activation_rules, replicated
from sysdpo_jax.training.compiling import CANDIDATES, COMPILER_OPTIONS, GIB, fastest_that_fits
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.training.step import TrainStep
from sysdpo_jax.typing import Params


class ComponentBytes(NamedTuple):
    """Bytes that one device holds of the component of this params key.

    params: its whole tree; reference: what of its reference is no leaf of params (a frozen leaf counts once);
    optimizer: the optimiser's state and the moving average; activations: the compiler's temporaries of the gradient of
    its own log-ratio, None where it is frozen or no batch was given; a `remat` of "auto" counts as what it tries first.
    """

    name: str
    params: int
    reference: int
    optimizer: int
    activations: int | None


class ShardingReport(NamedTuple):
    """Made by `describe_sharding`; str() is a table in MiB, ready to print."""

    components: tuple[ComponentBytes, ...]

    def __str__(self) -> str:
        header = ("MiB per device", *ComponentBytes._fields[1:])
        rows = [(row.name, *map(_mebibytes, row[1:])) for row in self.components]
        # Activations are not added: the components' need not be there at the same time.
        sums = [sum(column) for column in zip(*(row[1:4] for row in self.components), strict=True)]
        table = [header, *rows, ("all", *map(_mebibytes, sums), "")]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(line[1:], widths[1:], strict=True))])
            for line in table
        )


def describe_sharding(step: TrainStep, state: TrainState, batch: PyTree | None = None) -> ShardingReport:
    """What each device of the step's mesh holds of every component. Nothing runs; activations take a compilation each.

    A component's activations are those of the step's objective with the other components frozen, which leaves its own
    log-ratio; under `SamplingObjective` frozen components are evaluated too, without gradient.

    Args:
        step: Of the run.
        state: As `create_state` or, without any array, `abstract_state` makes it.
        batch: One batch of the step, arrays or `jax.ShapeDtypeStruct`; None leaves the activations out.

    Returns:
        Bytes by component; printed, a table.
    """

    def held(key: str) -> ComponentBytes:
        params = device_bytes((state.trained[key], state.frozen[key]))
        optimizer = device_bytes((state.opt_state.inner_states[key], (state.ema or {}).get(key)))
        known = batch is not None and key in state.reference
        activations = _activations(step, state, batch, key) if known else None
        return ComponentBytes(key, params, device_bytes(state.reference.get(key)), optimizer, activations)

    return ShardingReport(tuple(map(held, sorted(state.trained))))


def device_bytes(tree: PyTree) -> int:
    """Bytes of the leaves, arrays or abstract ones with a sharding, on each device that holds a part of them."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(step: TrainStep, state: TrainState, batch: PyTree, key: str) -> int:
    """Temporary bytes of the gradient of one component's trained leaves, for one of the step's parts of the batch."""

    def loss_of(trained: Params, state: TrainState, batch: PyTree, noise: PRNGKeyArray) -> Array:
        state = state._replace(trained={**state.trained, key: trained})
        with activation_rules(step.mesh):
            reference = {key: state.reference_params[key]}
            return step.objective(step.system, state.params, reference, batch, noise)[0]

    placed, whole = jax.tree.map(lambda x: x.sharding, state), replicated(step.mesh)
    parts = step.accumulate
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), batch)
    noise = jax.eval_shape(lambda: jax.random.key(0))
    function = jax.jit(
        jax.grad(loss_of),
        in_shardings=(placed.trained[key], placed, NamedSharding(step.mesh, BATCH_SPEC), whole),
        out_shardings=placed.trained[key],
        compiler_options=COMPILER_OPTIONS,
    )
    with choosing(CANDIDATES[0]):
        gradient = function.lower(state.trained[key], state, of_part(part, parts), noise)
    memory: Any = gradient.compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def compile_step(step: TrainStep, state: TrainState, batch: PyTree, usable_gib: float) -> dict[str, Any]:
    """The compiler's account of a step on TPUs.

    Args:
        step: On a mesh of a `topology`'s chips.
        state: Of `abstract_state`.
        batch: The shapes of a batch.
        usable_gib: Of a chip's memory.

    Returns:
        Whether it "fits", what a `remat` of "auto" became ("remat_auto", with the reason as "remat_why") where a model
        has it, and of one chip the memory in GiB and the collective operations or, where the compiler has no room for
        it, the first lines of what it says; and the seconds that all of it took.
    """
    seconds, programs, key = defaultdict[str, float](float), dict[str, jax.stages.Compiled](), jax.random.key(0)

    def compiled_as(setting: str) -> jax.stages.Compiled:
        began = time.monotonic()
        with compiling_for("tpu"):
            lowered = step.lower(state, batch, key, setting)
        traced, cpu = time.monotonic(), time.process_time()
        seconds["trace_and_lower"] += traced - began
        try:
            programs[setting] = lowered.compile()
        finally:
            seconds["compile"] += time.monotonic() - traced
            seconds["compile_of_all_cores"] += time.process_time() - cpu
        return programs[setting]

    with compiling_for("tpu"):
        settings = step.settings(state, batch, key)
    result: dict[str, Any] = {"usable_hbm_gib": usable_gib}
    try:
        decision = fastest_that_fits(settings, compiled_as, lambda program: int(usable_gib * GIB), "tpu")
    except jax.errors.JaxRuntimeError as error:
        # The compiler finds no room for the program in a chip's memory.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # How much is used of how much, without the list of buffers.
        said = re.split(r"\n\s*\n|Largest program allocations", str(error), maxsplit=1)[0][:2000]
        result |= {"fits": False, "compiler": said}
    else:
        if len(settings) > 1:
            result |= {"remat_auto": decision.setting, "remat_why": str(decision)}
        result |= _account(programs[decision.setting], usable_gib)
    return result | {"seconds": {name: round(value, 1) for name, value in seconds.items()}}


def _account(compiled: jax.stages.Compiled, usable_gib: float) -> dict[str, Any]:
    """Memory of one chip in GiB, the collectives, and the compiler's FLOPs and bytes that go to and from memory."""
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
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
        "compiler_flops_per_chip": costs.get("flops"),
        "compiler_bytes_per_chip": costs.get("bytes accessed"),
    }


def _collectives(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """By kind, or why the program cannot be read: JAX does not take back everything that libtpu writes."""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        return {"unreadable": str(error).splitlines()[0][:300]}
    return dict(collectives_by_kind(text))
