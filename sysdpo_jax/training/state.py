"""What training carries from step to step.

The parts of a tree keep its structure, with None where the other part has the leaf: None holds no array, so gradients
and optimiser memory exist for trained leaves only.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.parallel.sharding import Rules, like_params, make_mesh, replicated, tree_shardings
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.trees import by_path, path_name
from sysdpo_jax.typing import Params

# The frozen leaves and the reference of a `TrainState`.
Fixed: TypeAlias = tuple[Params, Params]


class Mutable(NamedTuple):
    """What a step replaces and donates, and a checkpoint holds."""

    step: Array
    trained: Params
    opt_state: PyTree
    ema: Params | None


class TrainState(NamedTuple):
    """Everything a run needs to go on, apart from data and key, in the parts that the step takes: no array is in two.

    Attributes:
        step: Updates made so far (int32 scalar).
        trained: Every component's tree, with None for the leaves that are not trained.
        opt_state: Of `SystemOptimizer.transformation`.
        ema: The trained leaves' moving average in float32, if there is one.
        frozen: Every component's tree, with None for the leaves that are trained.
        reference: `{key: tree}` of the components that are not frozen, the trained leaves as they were at first; the
            others are those of `frozen`. A tree is None where its log-probabilities were precomputed.
    """

    step: Array
    trained: Params
    opt_state: PyTree
    ema: Params | None
    frozen: Params
    reference: Params

    @property
    def params(self) -> Params:
        """Every component's whole tree."""
        return combine(self.trained, self.frozen)

    @property
    def reference_params(self) -> Params:
        """The whole reference of the components that are not frozen, None where it was precomputed."""
        # Present but None: its nodes are trained, their log-probabilities under it come with the batch.
        return {k: None if tree is None else combine(tree, self.frozen[k]) for k, tree in self.reference.items()}

    @property
    def mutable(self) -> Mutable:
        """The part that a step replaces."""
        return Mutable(self.step, self.trained, self.opt_state, self.ema)

    @property
    def fixed(self) -> Fixed:
        """The part that a step reads alone."""
        return self.frozen, self.reference

    def after(self, mutable: Mutable) -> "TrainState":
        """Replace what a step changes.

        Args:
            mutable: The new part.

        Returns:
            The state with it.
        """
        return TrainState(*mutable, *self.fixed)


def create_state(
    system: CompoundSystem,
    params: Params,
    optimizer: SystemOptimizer,
    mesh: Mesh | None = None,
    rules: Rules = (),
    reference_dtype: str | None = None,
    precomputed: Sequence[str] = (),
    reference: Params | None = None,
    step: int = 0,
) -> TrainState:
    """The state before the first step. Warns of trained leaves below float32.

    Args:
        system: The graph.
        params: `{params_key: tree}`, as `system.init` returns it; never changed nor deleted by training.
        optimizer: From `make_optimizer`.
        mesh: Where the state is placed; by default on the first device.
        rules: (regex, PartitionSpec) pairs, see `tree_shardings`.
        reference_dtype: Precision of the reference's matrices (kernels and embeddings). Where a model computes in it
            ("bfloat16", say) it rounds the policy's in the same way, and their log-ratio is 0 at first; where it
            computes in a finer one, the rounding is an error of the loss.
        precomputed: Params keys whose reference log-probabilities come with the batches (`precompute_reference`): the
            state holds no reference of theirs.
        reference: Another one than `params`, which differs in trained leaves alone.
        step: The number of the first step, where others came before it.

    Returns:
        The state, on the mesh.

    Raises:
        OptimizerError: If components and optimisers do not go together.
        ShardingError: For a rule that does not fit.
        ValueError: For parameters that do not belong to the system, and keys in `precomputed` that are not trained.
    """
    mesh = make_mesh() if mesh is None else mesh
    plan = abstract_state(system, params, optimizer, mesh, rules, reference_dtype, precomputed)
    mask = optimizer.mask(system, params)
    initial, frozen = partition(jax.tree.map(_place, params, plan.params), mask)
    compared = initial if reference is None else partition(jax.tree.map(_place, reference, plan.params), mask)[0]
    # The step donates its trained leaves: they need buffers of their own.
    trained = jax.tree.map(_own, initial)
    _warn_of_coarse(optimizer, trained)
    slots = jax.tree.map(lambda leaf: leaf.sharding, plan.opt_state)

    def first_slots(leaves: Params) -> PyTree:
        # An optimiser may keep the parameters themselves, but one buffer cannot be donated twice.
        return jax.tree.map(jnp.copy, optimizer.transformation.init(leaves))

    return TrainState(
        step=_place(jnp.asarray(step, jnp.int32), plan.step),
        trained=trained,
        opt_state=jax.jit(first_slots, out_shardings=slots)(trained),
        ema=None if optimizer.ema_decay is None else jax.tree.map(lambda x: _own(x.astype(jnp.float32)), trained),
        frozen=frozen,
        reference={
            key: None if tree is None else jax.tree.map(_in_dtype, compared[key], tree)
            for key, tree in plan.reference.items()
        },
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
    """What `create_state` makes, without any array: for compiling ahead of time.

    Args:
        system: The graph.
        params: Anything with shapes and dtypes, `jax.eval_shape(system.init, key)` for example.
        optimizer: From `make_optimizer`.
        mesh: It may be of devices that are not there: nothing is computed or placed.
        rules: As for `create_state`.
        reference_dtype: As for `create_state`.
        precomputed: As for `create_state`.

    Returns:
        The state of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        ValueError: As `create_state`, whose other errors are raised too.
    """
    system.check_params(params)
    optimizer.check(system)
    strangers = set(precomputed) - set(optimizer.trained_keys)
    if strangers:
        raise ValueError(
            f"precomputed names {sorted(strangers)}, which are no trained components: those are "
            f"{list(optimizer.trained_keys)}"
        )
    placed = jax.tree.map(_abstract, params, tree_shardings(mesh, params, rules))
    trained, frozen = partition(placed, optimizer.mask(system, params))
    slots = jax.eval_shape(optimizer.transformation.init, trained)
    return TrainState(
        step=_abstract(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        trained=trained,
        opt_state=jax.tree.map(_abstract, slots, like_params(mesh, slots, by_path(trained))),
        ema=None if optimizer.ema_decay is None else jax.tree.map(lambda x: x.update(dtype=jnp.float32), trained),
        frozen=frozen,
        reference={
            key: None if key in precomputed else _reference(trained[key], reference_dtype)
            for key in optimizer.trained_keys
        },
    )


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Split a tree in two.

    Args:
        tree: To be split.
        mask: True and False for its leaves.

    Returns:
        The leaves where the mask is True and the others, each with None in the places of the other.
    """
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, x: None if keep else x, mask, tree)
    return kept, rest


def combine(first: PyTree, second: PyTree) -> PyTree:
    """Undo `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def ema_params(state: TrainState) -> Params:
    """The parameters with the moving average in the trained leaves.

    Args:
        state: Of a run whose optimiser has an ema_decay.

    Returns:
        `{params_key: tree}`, in the parameters' own precision.

    Raises:
        ValueError: If the state keeps no average.
    """
    if state.ema is None:
        raise ValueError("the state keeps no moving average: give make_optimizer an ema_decay")
    averages = jax.tree.map(lambda average, leaf: average.astype(leaf.dtype), state.ema, state.trained)
    return combine(averages, state.frozen)


def _in_dtype(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
    # The same array, not an equal one, where nothing changes: the caller's parameters take memory once.
    return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)


def _abstract(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _reference(trained: Params, dtype: str | None) -> Params:
    """Abstract reference of one component's trained leaves."""

    def of_leaf(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Models round these to the precision they compute in; norms' weights and the like they use as they are.
        matrix = path_name(path).rpartition("/")[2] in ("kernel", "embedding")
        return leaf.update(dtype=jnp.dtype(dtype)) if matrix and dtype is not None else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, trained)


def _place(leaf: Any, like: Any) -> Array:
    sharding = like.sharding
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if not sharding.is_fully_addressable and not spread:
        # By parts: device_put would gather the whole leaf from every process to compare them, which is not done.
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda part: np.asarray(leaf[part]))
    # A NumPy array may change under us, so only immutable arrays may share their memory.
    return jax.device_put(leaf, sharding, may_alias=isinstance(leaf, jax.Array))


def _warn_of_coarse(optimizer: SystemOptimizer, trained: Params) -> None:
    rounded = [key for key, component in optimizer.components if not component.master_weights]
    coarse = sorted({key for key in rounded for leaf in jax.tree.leaves(trained[key]) if leaf.dtype.itemsize < 4})
    if coarse:
        warnings.warn(
            f"the trained parameters of {', '.join(coarse)} have less than 32 bits: updates of the usual size round to "
            "nothing. Load them with param_dtype='float32', set master_weights, or train LoRA factors",
            stacklevel=3,
        )


def _own(leaf: Array) -> Array:
    return jax.device_put(leaf, leaf.sharding, may_alias=False)
