"""What a device holds of every component, before anything runs."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from sysdpo_jax.training.optimizer import combine, partition
from sysdpo_jax.training.sharding import BATCH_SPEC, activation_rules, replicated
from sysdpo_jax.training.state import TrainState, split
from sysdpo_jax.training.step import TrainStep
from sysdpo_jax.typing import Params


class ComponentBytes(NamedTuple):
    """Bytes that one device holds of the component of this params key.

    params: its whole tree; reference: what of its reference is no leaf of params (a frozen leaf counts once);
    optimizer: the optimiser's state and the moving average; activations: the compiler's temporaries of the gradient of
    its own log-ratio, None where it is frozen or no batch was given.
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

    state: as `create_state` or, without any array, `abstract_state` makes it.
    batch: one batch of the step, arrays or `jax.ShapeDtypeStruct`; None leaves the activations out.
    A component's activations are those of the step's objective with the other components frozen, which leaves its own
    log-ratio; under `SamplingObjective` frozen components are evaluated too, without gradient.
    """
    mask = step.optimizer.mask(state.params, step.system)
    carry, fixed = split(state, mask)
    ema = carry.ema or {}
    return ShardingReport(
        tuple(
            ComponentBytes(
                name=key,
                params=device_bytes(state.params[key]),
                reference=device_bytes(fixed.reference.get(key)),
                optimizer=device_bytes((carry.opt_state.get(key), ema.get(key))),
                activations=None
                if batch is None or key not in state.reference
                else _activations(step, state, batch, key),
            )
            for key in sorted(state.params)
        )
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes of the leaves, arrays or abstract ones with a sharding, on each device that holds a part of them."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(step: TrainStep, state: TrainState, batch: PyTree, key: str) -> int:
    """Temporary bytes of the gradient of one component's trained leaves, for one of the step's parts of the batch."""
    trained, frozen = partition(state.params[key], step.optimizer.mask(state.params, step.system)[key])
    others = {name: tree for name, tree in state.params.items() if name != key}

    def loss_of(
        trained: Params, frozen: Params, others: Params, reference: Params, batch: PyTree, noise: PRNGKeyArray
    ) -> Array:
        params = {**others, key: combine(trained, frozen)}
        with activation_rules(step.mesh):
            return step.objective(step.system, params, {key: reference}, batch, noise)[0]

    trees = (trained, frozen, others, state.reference[key])
    shardings = jax.tree.map(lambda x: x.sharding, trees)
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // step.accumulate, *x.shape[1:]), x.dtype), batch)
    noise = jax.eval_shape(lambda: jax.random.key(0))
    whole = replicated(step.mesh)
    gradient = jax.jit(
        jax.grad(loss_of),
        in_shardings=(*shardings, NamedSharding(step.mesh, BATCH_SPEC), whole),
        out_shardings=shardings[0],
    )
    memory: Any = gradient.lower(*trees, part, noise).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
