"""A switch and a loop on meshes of 8 virtual devices: prints, as JSON, how their steps differ from one device's.

Run by test_routed_meshes.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
from typing import Any

import jax
import numpy as np
import optax

from sysdpo_jax import (
    CompoundSystem,
    DirectObjective,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    preference_dataset,
)
from sysdpo_jax.training import ComponentOptimizer
from tests import test_loop, test_switch

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
KEY = jax.random.key(0)


def stepped(system: CompoundSystem, batch: Any, shape: tuple[int, int, int], accumulate: int) -> tuple[Any, float]:
    """The parameters after a step, and the compiler's count of a device's operations."""
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(0.1)) for name in system.param_keys})
    mesh = make_mesh(*shape)
    state = create_state(system, system.init(KEY), optimizer, mesh)
    step = make_train_step(system, DirectObjective(), optimizer, mesh, accumulate)
    cost: Any = step.lower(state, batch, KEY).compile().cost_analysis()
    state, metrics = step(state, batch, KEY)
    assert bool(metrics["finite"])
    return jax.device_get(state.params), float(cost["flops"])


def main() -> None:
    models, half = test_switch.two_models()
    cases = {
        "switch": (test_switch.ROUTER, preference_dataset(test_switch.ROUTER, test_switch.RECORDS, 16, seed=3)[0]),
        "loop": (test_loop.AGENT, preference_dataset(test_loop.AGENT, test_loop.RECORDS, 16, seed=3)[0]),
        "models": (models, half),
    }
    found: dict[str, Any] = {}
    for name, (system, batch) in cases.items():
        first, whole = stepped(system, batch, MESHES["1x1x1"], 1)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, jax.device_get(system.init(KEY)))
        assert min(jax.tree.leaves(moved)) > 1e-4
        for mesh, shape in MESHES.items():
            for accumulate in (1, 2):
                params, flops = stepped(system, batch, shape, accumulate)
                errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, first)
                error = max(jax.tree.leaves(errors))
                found[f"{name} {mesh} {accumulate}"] = {"error": error, "share": flops / whole}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
