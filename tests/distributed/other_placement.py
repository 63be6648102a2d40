"""Saves a state on one mesh of 8 virtual devices, restores it on others, and prints what happened as JSON.

Run by test_other_placement.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import sys
import tempfile

import jax
import numpy as np
import optax

from sysdpo_jax import CompoundSystem, Gaussian, Node
from sysdpo_jax.training import Checkpoints, ComponentOptimizer, create_state, make_mesh, make_optimizer

WIDTH = 256
SYSTEM = CompoundSystem(("x",), (Node("a", Gaussian(WIDTH, WIDTH), ("x",)), Node("b", Gaussian(1, WIDTH), ("a",))))
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(0.1)) for name in "ab"}, ema_decay=0.9)
MESHES = {"one": {"data": 1}, "data": {"data": 8}, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 4}}
PAIRS = (("fsdp", "one"), ("data", "fsdp"), ("one", "mixed"))


def fresh(name):
    return create_state(SYSTEM, SYSTEM.init(jax.random.key(0)), OPTIMIZER, make_mesh(**MESHES[name]))


def opened(directory, state):
    return Checkpoints(directory, state, OPTIMIZER.mask(state.params, SYSTEM), {})


def moved(state):
    """Other numbers than those of the start, placed as they were."""
    changed = jax.tree.map(lambda x: x * 2 + 1, (state.params, state.opt_state, state.ema))
    return state._replace(step=state.step + 3, params=changed[0], opt_state=changed[1], ema=changed[2])


def words(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.step, state.params, state.opt_state, state.ema))]


def restored(first, second):
    with tempfile.TemporaryDirectory() as directory:
        saved, target = moved(fresh(first)), fresh(second)
        with opened(directory, saved) as checkpoints:
            checkpoints.save(saved)
        with opened(directory, target) as checkpoints:
            found = checkpoints.restore(target)
    placed = [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(target)]
    rows = found.params["a"]["kernel"].addressable_shards[0].data.shape[0]
    return {
        "same": words(found) == words(saved),
        "placed": placed,
        "changed": words(saved) != words(target),
        "rows": rows,
    }


if __name__ == "__main__":
    json.dump({f"{first} to {second}": restored(first, second) for first, second in PAIRS}, sys.stdout)
