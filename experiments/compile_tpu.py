"""Compile the training step of a large system for a TPU slice, on a machine without TPUs, and say whether it fits.

    python -m experiments.compile_tpu --system llama3-8b+sdxl --topology v5e:4x4 --mode full > step.json

It is the step that a run would take (`make_train_step`), with its optimiser, reference, donation and sharding;
parameters and batch are shapes. What it prints, as JSON, is the compiler's account of one chip's memory, the collective
operations, and the operations counted from shapes. It needs libtpu: `pip install ".[tpu-aot]"`.

Nothing is taken from a cache: the seconds are part of the account. The compiler's level O1 takes minutes where its
default, which a run uses, takes half an hour for SDXL's U-Net; their memory differs by some percent.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.common.command import made_by, parse
from experiments.scaling.systems import SYSTEMS, Config, Example, fine_tuning
from sysdpo_jax import CompoundSystem, SampledBatch, make_train_step
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.models import choosing
from sysdpo_jax.parallel import USABLE_HBM_GIB, batch_parts, topology_mesh
from sysdpo_jax.training import (
    SystemOptimizer,
    TrainState,
    abstract_state,
    compile_step,
    count_flops,
    plain_attention,
    step_flops,
)

FLOPS_NOTE = (
    "operations of one step on all chips, counted from shapes: 'model' is what the mathematics needs (a trained "
    "model's forward pass 3 times, 2 with LoRA, its reference's once, on both sides), 'with_recomputation' adds what "
    "the backward pass computes again; attention counts every score. The compiler's own figure is of one chip, has a "
    "scanned layer once and a kernel not at all: it is stated to be compared, not used"
)


def plan(config: Config, mesh: Mesh) -> tuple[Example, SystemOptimizer, TrainState, PyTree]:
    """The system, its optimiser, and the shapes of its state and batch. Raises SystemExit for an unknown system."""
    if config.system not in SYSTEMS:
        raise SystemExit(f"unknown system {config.system!r}: choose one of {', '.join(SYSTEMS)}")
    pixels, make = SYSTEMS[config.system]
    example = make(config, config.image_size or pixels)
    shapes = jax.eval_shape(plain(example.system).init, jax.random.key(0))
    params, optimizer = fine_tuning(config, example.system, shapes)
    state = abstract_state(example.system, params, optimizer, mesh)
    return example, optimizer, state, example.batch(config.batch or batch_parts(mesh))


def plain(system: CompoundSystem) -> CompoundSystem:
    """The same system with attention as plain products, whose parameters are the same."""
    return replace(
        system, nodes=tuple(replace(node, component=plain_attention(node.component)) for node in system.nodes)
    )


def count(example: Example, state: TrainState, batch: PyTree, auto: str | None) -> dict[str, Any]:
    """FLOPs of one step, see FLOPS_NOTE. auto: what a `remat` of "auto" became."""
    model = step_flops(example.system, state, batch)

    def loss(trained: PyTree, state: TrainState, batch: PyTree) -> Any:
        whole = state._replace(trained=trained)
        return example.objective(plain(example.system), whole.params, whole.reference_params, batch, jax.random.key(0))

    with choosing(auto):
        again = count_flops(jax.grad(loss, has_aux=True), state.trained, state, batch)
    return {"note": FLOPS_NOTE, "model": model, "model_total": sum(model.values()), "with_recomputation": again}


def run(config: Config) -> dict[str, Any]:
    """Everything that is printed."""
    generation = config.topology.partition(":")[0]
    mesh = topology_mesh(config.topology, config.data, config.fsdp, config.tensor)
    example, optimizer, state, batch = plan(config, mesh)
    step = make_train_step(example.system, example.objective, optimizer, mesh, config.accumulate)
    result = compile_step(step, state, batch, USABLE_HBM_GIB[generation])
    return {
        "system": config.system,
        "topology": config.topology,
        "mode": config.mode,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "pairs_per_step": jax.tree.leaves(batch)[0].shape[0],
        "sequence": config.sequence,
        "image_size": config.image_size or SYSTEMS[config.system][0] or None,
        "intermediates": config.intermediates if isinstance(batch, SampledBatch) else None,
        "parameters": {key: sum(leaf.size for leaf in jax.tree.leaves(tree)) for key, tree in state.params.items()},
        "level": config.level,
        **result,
        "flops": count(example, state, batch, result.get("remat_auto")),
    }


def _commit() -> str | None:
    """Of the working tree, with "-dirty" where it has changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: list[str]) -> None:
    """Print the account. Raises SystemExit with code 1 when the step does not fit."""
    config = parse(Config(), arguments, __doc__)
    # No device of this machine is needed, and one that is busy would be in the way.
    jax.config.update("jax_platforms", "cpu")
    if config.level != "default":
        jax.config.update("jax_optimization_level", config.level)
    try:
        result = run(config)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    about = made_by("experiments.compile_tpu", arguments, ("jax", "jaxlib", "libtpu", "flax"))
    result["made_by"] = about | {"commit": _commit()}
    print(json.dumps(result, indent=1))
    if not result["fits"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
