"""What training carries from step to step."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.training.optimizer import SystemOptimizer, combine, partition
from sysdpo_jax.training.sharding import Rules, by_path, like_params, make_mesh, replicated, tree_shardings
from sysdpo_jax.typing import Params


class TrainState(NamedTuple):
    """Everything a run needs to go on, apart from data and key.

    step: updates made so far (int32 scalar); params: every component's tree; reference: the trained components' trees.
    opt_state: `{params_key: optax state}` of trained leaves; ema: their moving average in float32 (None elsewhere).
    Leaves that are not trained are the same arrays in params and reference: they take memory once.
    """

    step: Array
    params: Params
    reference: Params
    opt_state: PyTree
    ema: Params | None = None


class Carry(NamedTuple):
    """The part of the state that a step replaces and a checkpoint holds; trained has None for leaves not trained."""

    step: Array
    trained: Params
    opt_state: PyTree
    ema: Params | None


class Fixed(NamedTuple):
    """The part of the state that training only reads, no array twice.

    frozen has None for trained leaves; reference has None where its leaf is the very array that frozen holds.
    """

    frozen: Params
    reference: Params


def split(state: TrainState, mask: PyTree) -> tuple[Carry, Fixed]:
    """The state in two parts. mask: `SystemOptimizer.mask` of its parameters."""
    trained, frozen = partition(state.params, mask)
    shared = {key: frozen[key] for key in state.reference}
    reference = jax.tree.map(lambda leaf, own: None if leaf is own else leaf, state.reference, shared)
    return Carry(state.step, trained, state.opt_state, state.ema), Fixed(frozen, reference)


def join(carry: Carry, fixed: Fixed) -> TrainState:
    """Undo `split`."""
    params = combine(carry.trained, fixed.frozen)
    return TrainState(carry.step, params, whole_reference(fixed), carry.opt_state, carry.ema)


def whole_reference(fixed: Fixed) -> Params:
    """The trained components' reference trees, with the leaves that they share with the parameters."""
    return combine(fixed.reference, {key: fixed.frozen[key] for key in fixed.reference})


def create_state(
    system: CompoundSystem, params: Params, optimizer: SystemOptimizer, mesh: Mesh | None = None, rules: Rules = ()
) -> TrainState:
    """The state before the first step, placed on the mesh (default: the first device), with `params` as reference.

    params: `{params_key: tree}`, as `system.init` returns it; never changed nor deleted by training.
    rules: (regex, PartitionSpec) pairs, see `tree_shardings`.
    Warns of trained leaves below float32. Raises `OptimizerError`, `ShardingError`, or `ValueError` for parameters that
    do not belong to the system.
    """
    system.check_params(params)
    optimizer.check(system)
    mesh = make_mesh() if mesh is None else mesh
    mask = optimizer.mask(params)
    shardings = tree_shardings(mesh, params, rules)
    fixed = jax.tree.map(_place, params, shardings)
    # The step donates its trained leaves: they need buffers of their own.
    trained = partition(jax.tree.map(_copy, fixed, mask), mask)[0]
    _warn_of_coarse(trained)
    slots = like_params(mesh, jax.eval_shape(optimizer.init, trained), by_path(trained))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)),
        params=combine(trained, partition(fixed, mask)[1]),
        reference={key: fixed[key] for key in optimizer.trained_keys},
        opt_state=jax.jit(lambda leaves: _own(optimizer.init(leaves)), out_shardings=slots)(trained),
        ema=None if optimizer.ema_decay is None else jax.tree.map(_average, trained),
    )


def ema_params(state: TrainState) -> Params:
    """The parameters with the moving average in the trained leaves, in the parameters' own precision.

    Raises `ValueError` when the state keeps no average.
    """
    if state.ema is None:
        raise ValueError("the state keeps no moving average: give make_optimizer an ema_decay")
    return jax.tree.map(
        lambda average, leaf: leaf if average is None else average.astype(leaf.dtype),
        state.ema,
        state.params,
        is_leaf=lambda x: x is None,
    )


def _place(leaf: Any, sharding: NamedSharding) -> Array:
    # A NumPy array may change under us, so only immutable arrays may share their memory.
    return jax.device_put(leaf, sharding, may_alias=isinstance(leaf, jax.Array))


def _copy(leaf: Array, trained: bool) -> Array:
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if trained else leaf


def _warn_of_coarse(trained: Params) -> None:
    coarse = sorted({key for key, tree in trained.items() for leaf in jax.tree.leaves(tree) if leaf.dtype.itemsize < 4})
    if coarse:
        warnings.warn(
            f"the trained parameters of {', '.join(coarse)} have less than 32 bits: updates of the usual size round to "
            "nothing. Load them with param_dtype='float32', or train LoRA factors",
            stacklevel=3,
        )


def _own(tree: PyTree) -> PyTree:
    # An optimiser may keep the parameters themselves, but one buffer cannot be donated twice.
    return jax.tree.map(jnp.copy, tree)


def _average(leaf: Array) -> Array:
    return jax.device_put(leaf.astype(jnp.float32), leaf.sharding, may_alias=False)
