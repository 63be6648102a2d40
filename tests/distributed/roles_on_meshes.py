"""Three steps of roles on meshes of 8 virtual devices, as JSON: their losses, and the bytes that a step gathers.

Run by test_roles_meshes.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import sys
from unittest.mock import patch

import jax
import numpy as np
import optax

from sysdpo_jax import (
    FROZEN,
    LORA_PARAMS,
    ComponentOptimizer,
    DirectObjective,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
)
from sysdpo_jax.parallel.hlo import collectives_by_kind
from sysdpo_jax.training.ahead_of_time import device_bytes
from tests.objectives.test_roles_together import KEY, ROLES, batch, parameters, system

MESHES = {"one": {"data": 1}, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}
LORA = ComponentOptimizer(optax.adam(1e-2), trainable=LORA_PARAMS)
OPTIMIZER = make_optimizer({**dict.fromkeys(ROLES, LORA), "base": FROZEN})
# Weights of any size are cut.
SMALL = patch("sysdpo_jax.parallel.sharding.MIN_SHARDED_SIZE", 64)


def run(axes):
    """Losses, bytes of the base on a device, and bytes that the step gathers."""
    mesh, pairs = make_mesh(**axes), batch(rows=8)
    state = create_state(system(), parameters(), OPTIMIZER, mesh)
    step = make_train_step(system(), DirectObjective(0.5), OPTIMIZER, mesh)
    held = device_bytes(state.frozen["base"])
    gathered = collectives_by_kind(step.lower(state, pairs, KEY).compile().as_text()).get("all-gather", {"bytes": 0})
    figures = []
    for _ in range(3):
        state, metrics = step(state, pairs, KEY)
        figures.append([float(metrics[name]) for name in ("loss", *(f"grad_norm/{role}" for role in ROLES))])
    return {"figures": figures, "base": held, "gathered": gathered["bytes"]}


def main() -> None:
    with SMALL:
        found = {name: run(axes) for name, axes in MESHES.items()}
        with patch("sysdpo_jax.roles.pays", lambda *_: False):
            found["fsdp, apart"] = run(MESHES["fsdp"])
    assert np.isfinite(jax.tree.leaves(found)).all()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
