"""What `describe_sharding` says a device holds, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sysdpo_jax import CompoundSystem, DirectObjective, Gaussian, Node, PairBatch
from sysdpo_jax.parallel.sharding import AXES
from sysdpo_jax.training import FROZEN, ComponentOptimizer, describe_sharding, make_mesh, make_optimizer
from sysdpo_jax.training.ahead_of_time import device_bytes
from sysdpo_jax.training.state import abstract_state, create_state
from sysdpo_jax.training.step import make_train_step

WIDTH = 32
KERNEL, BIAS, COUNT = 4 * WIDTH * WIDTH, 4 * WIDTH, 4
SYSTEM = CompoundSystem(
    ("x",), tuple(Node(name, Gaussian(WIDTH, WIDTH), ("x",)) for name in ("frozen", "full", "kernel"))
)
ADAM = optax.adam(1e-3)
OPTIMIZER = make_optimizer(
    {"frozen": FROZEN, "full": ComponentOptimizer(ADAM), "kernel": ComponentOptimizer(ADAM, trainable="kernel")}
)


def batch(rows):
    of_node = {name: np.zeros((rows, WIDTH), np.float32) for name in ("value", "parents")}
    side = {node.name: of_node for node in SYSTEM.nodes}
    return PairBatch(side, side)


def report(rows=None, optimizer=OPTIMIZER, state=abstract_state, accumulate=1):
    mesh = make_mesh()
    step = make_train_step(SYSTEM, DirectObjective(), optimizer, mesh, accumulate)
    made = state(SYSTEM, SYSTEM.init(jax.random.key(0)), optimizer, mesh)
    return describe_sharding(step, made, None if rows is None else batch(rows))


@pytest.mark.parametrize("state", [abstract_state, create_state])
def test_bytes_are_those_of_the_leaves(state):
    """Frozen leaves are no part of the reference, and the optimiser knows nothing of them."""
    rows = {row.name: row[1:] for row in report(state=state).components}
    assert rows == {
        "frozen": (KERNEL + BIAS, 0, 0, None),
        "full": (KERNEL + BIAS, KERNEL + BIAS, 2 * (KERNEL + BIAS) + COUNT, None),
        "kernel": (KERNEL + BIAS, KERNEL, 2 * KERNEL + COUNT, None),
    }


def test_the_moving_average_is_the_optimisers():
    averaged = make_optimizer(dict(OPTIMIZER.components), ema_decay=0.9)
    rows = {row.name: row.optimizer for row in report(optimizer=averaged).components}
    assert rows == {"frozen": 0, "full": 3 * (KERNEL + BIAS) + COUNT, "kernel": 3 * KERNEL + COUNT}


def test_activations_are_those_of_one_component_and_grow_with_the_batch():
    """At least one [2, rows, width] error of either of the two models; of a part, where the step accumulates."""
    small, large = ({row.name: row.activations for row in report(rows).components} for rows in (256, 4096))
    assert small["frozen"] is large["frozen"] is None
    for name in ("full", "kernel"):
        assert 4 * 2 * 4096 * WIDTH <= large[name] <= 16 * (4 * 2 * 4096 * WIDTH)
        assert small[name] < large[name] / 8
    parts = {row.name: row.activations for row in report(4096, accumulate=16).components}
    assert parts == small


def test_a_leaf_counts_the_part_that_a_device_holds():
    mesh = AbstractMesh((2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    leaf = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    assert device_bytes({"a": leaf, "b": None}) == 2 * 8 * 6 // 4


def test_the_report_prints_a_table():
    lines = str(report()).splitlines()
    assert lines[0].split() == ["MiB", "per", "device", "params", "reference", "optimizer", "activations"]
    assert [line.split()[0] for line in lines[1:]] == ["frozen", "full", "kernel", "all"]
    assert len({len(line) for line in lines}) == 1
