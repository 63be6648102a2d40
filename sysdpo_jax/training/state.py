"""What training carries from step to step."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.training.optimizer import SystemOptimizer, combine, partition
from sysdpo_jax.training.sharding import Rules, by_path, like_params, make_mesh, path_name, replicated, tree_shardings
from sysdpo_jax.typing import Params


class TrainState(NamedTuple):
    """Everything a run needs to go on, apart from data and key.

    step: updates made so far (int32 scalar); params: every component's tree; reference: the trained components' trees,
    None for one whose log-probabilities were precomputed.
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

    frozen has None for trained leaves; reference has None where its leaf is the very array that frozen holds, and for a
    whole tree that was precomputed.
    """

    frozen: Params
    reference: Params


def split(state: TrainState, mask: PyTree) -> tuple[Carry, Fixed]:
    """The state in two parts. mask: `SystemOptimizer.mask` of its parameters."""
    trained, frozen = partition(state.params, mask)
    reference = {
        key: None if tree is None else jax.tree.map(lambda leaf, own: None if leaf is own else leaf, tree, frozen[key])
        for key, tree in state.reference.items()
    }
    return Carry(state.step, trained, state.opt_state, state.ema), Fixed(frozen, reference)


def join(carry: Carry, fixed: Fixed) -> TrainState:
    """Undo `split`."""
    params = combine(carry.trained, fixed.frozen)
    return TrainState(carry.step, params, whole_reference(fixed), carry.opt_state, carry.ema)


def whole_reference(fixed: Fixed) -> Params:
    """The trained components' reference trees, with the leaves that they share with the parameters."""
    return {
        # Present but None: its nodes are trained, their log-probabilities under it come with the batch.
        key: None if tree is None else combine(tree, fixed.frozen[key])
        for key, tree in fixed.reference.items()
    }


def create_state(
    system: CompoundSystem,
    params: Params,
    optimizer: SystemOptimizer,
    mesh: Mesh | None = None,
    rules: Rules = (),
    reference_dtype: str | None = None,
    precomputed: Sequence[str] = (),
) -> TrainState:
    """The state before the first step, placed on the mesh (default: the first device), with `params` as reference.

    params: `{params_key: tree}`, as `system.init` returns it; never changed nor deleted by training.
    rules: (regex, PartitionSpec) pairs, see `tree_shardings`.
    reference_dtype: precision of the reference's matrices (kernels and embeddings). Where a model computes in it
    ("bfloat16", say) it rounds the policy's in the same way, and their log-ratio is 0 at first; where it computes in a
    finer one, the rounding is an error of the loss.
    precomputed: params keys whose reference log-probabilities come with the batches (`precompute_reference`): the state
    holds no reference of theirs.
    Warns of trained leaves below float32. Raises `OptimizerError`, `ShardingError`, or `ValueError` for parameters that
    do not belong to the system and keys in `precomputed` that are not trained.
    """
    mesh = make_mesh() if mesh is None else mesh
    plan = abstract_state(system, params, optimizer, mesh, rules, reference_dtype, precomputed)
    mask = optimizer.mask(params, system)
    fixed = jax.tree.map(_place, params, jax.tree.map(lambda leaf: leaf.sharding, plan.params))
    # The step donates its trained leaves: they need buffers of their own.
    trained = partition(jax.tree.map(_copy, fixed, mask), mask)[0]
    _warn_of_coarse(optimizer, trained)
    slots = jax.tree.map(lambda leaf: leaf.sharding, plan.opt_state)
    return TrainState(
        step=_place(jnp.zeros((), jnp.int32), replicated(mesh)),
        params=combine(trained, partition(fixed, mask)[1]),
        reference={
            key: None if tree is None else jax.tree.map(_in_dtype, fixed[key], tree)
            for key, tree in plan.reference.items()
        },
        opt_state=jax.jit(lambda leaves: _own(optimizer.init(leaves)), out_shardings=slots)(trained),
        ema=None if optimizer.ema_decay is None else jax.tree.map(_average, trained),
    )


def abstract_state(
    system: CompoundSystem,
    params: Params,
    optimizer: SystemOptimizer,
    mesh: Mesh,
    rules: Rules = (),
    reference_dtype: str | None = None,
    precomputed: Sequence[str] = (),
) -> TrainState:
    """What `create_state` makes, as `jax.ShapeDtypeStruct` with shardings: for compiling ahead of time.

    params: anything with shapes and dtypes, `jax.eval_shape(system.init, key)` for example. Nothing is computed or
    placed; the mesh may be of devices that are not there. Raises as `create_state` does.
    """
    system.check_params(params)
    optimizer.check(system)
    strangers = set(precomputed) - set(optimizer.trained_keys)
    if strangers:
        raise ValueError(
            f"precomputed names {sorted(strangers)}, which are no trained components: those are "
            f"{list(optimizer.trained_keys)}"
        )
    mask = optimizer.mask(params, system)
    placed = jax.tree.map(_abstract, params, tree_shardings(mesh, params, rules))
    trained = partition(placed, mask)[0]
    slots = jax.eval_shape(optimizer.init, trained)
    return TrainState(
        step=_abstract(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        params=placed,
        reference={
            key: None if key in precomputed else _reference(placed[key], mask[key], reference_dtype)
            for key in optimizer.trained_keys
        },
        opt_state=jax.tree.map(_abstract, slots, like_params(mesh, slots, by_path(trained))),
        ema=None if optimizer.ema_decay is None else jax.tree.map(lambda x: x.update(dtype=jnp.float32), trained),
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


def _abstract(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _reference(tree: Params, mask: PyTree, dtype: str | None) -> Params:
    """Abstract reference of one component: leaves that are not trained are the very ones of the parameters."""

    def of_leaf(path: Sequence[Any], leaf: jax.ShapeDtypeStruct, trained: bool) -> jax.ShapeDtypeStruct:
        # Models round these to the precision they compute in; norms' weights and the like they use as they are.
        matrix = path_name(path).rpartition("/")[2] in ("kernel", "embedding")
        return leaf.update(dtype=jnp.dtype(dtype)) if trained and matrix and dtype is not None else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, tree, mask)


def _place(leaf: Any, sharding: NamedSharding) -> Array:
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if not sharding.is_fully_addressable and not spread:
        # By parts: device_put would gather the whole leaf from every process to compare them, which is not done.
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda part: np.asarray(leaf[part]))
    # A NumPy array may change under us, so only immutable arrays may share their memory.
    return jax.device_put(leaf, sharding, may_alias=isinstance(leaf, jax.Array))


def _in_dtype(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
    # The same array, not an equal one, where nothing changes: what is shared takes memory once.
    return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)


def _copy(leaf: Array, trained: bool) -> Array:
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if trained else leaf


def _warn_of_coarse(optimizer: SystemOptimizer, trained: Params) -> None:
    rounded = [key for key, component in optimizer.components if not component.master_weights]
    coarse = sorted({key for key in rounded for leaf in jax.tree.leaves(trained[key]) if leaf.dtype.itemsize < 4})
    if coarse:
        warnings.warn(
            f"the trained parameters of {', '.join(coarse)} have less than 32 bits: updates of the usual size round to "
            "nothing. Load them with param_dtype='float32', set master_weights, or train LoRA factors",
            stacklevel=3,
        )


def _own(tree: PyTree) -> PyTree:
    # An optimiser may keep the parameters themselves, but one buffer cannot be donated twice.
    return jax.tree.map(jnp.copy, tree)


def _average(leaf: Array) -> Array:
    return jax.device_put(leaf.astype(jnp.float32), leaf.sharding, may_alias=False)
