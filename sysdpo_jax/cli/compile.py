"""Compile the step of a run for TPUs that are not there, and say whether it fits.

example:
  sysdpo compile my_run.yaml --topology v5e:4x4 --mesh.data 4

Memory, collectives and FLOPs are printed as JSON; the exit code is 1 if the step does not fit. The models and a first
batch are loaded into this machine's memory, which must hold them. The compiler is libtpu: pip install
"sysdpo_jax[tpu-aot]".
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

import sysdpo_jax as sj
from sysdpo_jax.parallel.topology import USABLE_HBM_GIB, topology_mesh
from sysdpo_jax.runs.config import MeshConfig, TrainConfig
from sysdpo_jax.runs.evaluation import check_first
from sysdpo_jax.runs.run import assemble, first_batch, make_batches, read_preferences
from sysdpo_jax.training import abstract_state, compile_step

SHOWN = (
    *("topology", "level", "mesh.data", "mesh.fsdp", "mesh.tensor", "schedule.batch_size", "schedule.accumulate"),
    *("data.source", "dtype", "remat"),
)


@dataclass(frozen=True)
class Config(TrainConfig):
    """What to compile: a run, whose fields are those of `sysdpo train`.

    Args:
        topology: TPU slice: its generation and sides, such as v5e:4x4.
        level: Effort of the compiler; a run uses "default", and O1 takes a fraction of its time.
    """

    topology: str = "v5e:2x2"
    level: Literal["O0", "O1", "default"] = "O1"


def run(config: Config) -> None:
    """Print the account. Raises `ConfigError` for what cannot be compiled, SystemExit where it does not fit."""
    # No other device of this machine is needed, and one that is busy would be in the way.
    jax.config.update("jax_platforms", "cpu")
    check_first(config)
    mesh = topology_mesh(config.topology, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    here = assemble(replace(config, mesh=MeshConfig(fsdp=1)))
    batch = first_batch(here, make_batches(here, read_preferences(here)))
    if config.level != "default":
        jax.config.update("jax_optimization_level", config.level)
    step = sj.make_train_step(here.system, here.objective, here.optimizer, mesh, config.schedule.accumulate)
    state = abstract_state(here.system, here.params, here.optimizer, mesh)
    shapes: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    account = compile_step(step, state, shapes, USABLE_HBM_GIB[config.topology.partition(":")[0]])
    about = {"topology": config.topology, "mesh": dict(mesh.shape), "pairs_per_step": config.schedule.batch_size}
    print(json.dumps(about | {"level": config.level} | account, indent=1))
    if not account["fits"]:
        raise SystemExit(1)
