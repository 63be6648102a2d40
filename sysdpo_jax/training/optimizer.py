"""One optax transformation for the whole system: per component an optimiser, a clip, and which leaves are trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.models.lora import is_lora
from sysdpo_jax.trees import by_path, path_name
from sysdpo_jax.typing import Params

# Leaves that no training changes, whatever the pattern: an optimiser's weight decay would, without any gradient.
CONSTANTS = frozenset({"lora_scale", "pos_embed"})


class OptimizerError(ValueError):
    """The optimiser does not fit the system: the message names the component and the remedy."""


@dataclass(frozen=True)
class ComponentOptimizer:
    """How one parameter tree is trained.

    Args:
        optimizer: Any optax transformation, its learning rate included; as `optax.partition` has it, it sees
            `{params_key: tree}` of this component alone.
        clip_norm: Largest global norm of the component's gradient, in float32; None for no clipping.
        mode: "frozen" keeps the tree as it is, out of reference and optimiser memory.
        trainable: Regex found in the "/"-joined path below the params key; leaves that it misses are not trained, nor
            are the constants of a model (LoRA's scale, a fixed table of positions) and what a component declares
            `frozen`.
        master_weights: Keep float32 copies of trained leaves of less precision, which updates add up in; the parameters
            are these, rounded.
        state_dtype: Precision that the optimiser's arrays (moments) are kept in between updates, which compute in that
            of the optimiser; by default both are the same.

    Raises:
        OptimizerError: For a value that none of these can have.
    """

    optimizer: optax.GradientTransformation
    clip_norm: float | None = 1.0
    mode: Literal["full", "frozen"] = "full"
    trainable: str = ".*"
    master_weights: bool = False
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("full", "frozen"):
            raise OptimizerError(f"unknown mode {self.mode!r}: choose 'full' or 'frozen'")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise OptimizerError(f"clip_norm must be positive, got {self.clip_norm}: use None for no clipping")
        if self.state_dtype is not None and not jnp.issubdtype(jnp.dtype(self.state_dtype), jnp.floating):
            raise OptimizerError(f"state_dtype {self.state_dtype!r} is no floating-point type: bfloat16, for example")

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimiser with the clip before it and the precisions around it."""
        if self.mode == "frozen":
            return optax.set_to_zero()
        made = self.optimizer
        if self.clip_norm is not None:
            made = optax.chain(_clip(self.clip_norm), made)
        if self.state_dtype is not None:
            made = _with_state_dtype(made, self.state_dtype)
        return _with_master_weights(made) if self.master_weights else made


class MasterState(NamedTuple):
    """The optimiser's state of a component with master weights: those, in float32, and the transformation's own."""

    weights: Params
    inner: PyTree


FROZEN = ComponentOptimizer(optax.set_to_zero(), mode="frozen")
"""Of a component that is not trained."""


@dataclass(frozen=True)
class SystemOptimizer:
    """The optimiser of a whole system, made by `make_optimizer`.

    Args:
        components: (params_key, ComponentOptimizer) pairs.
        ema_decay: Of the moving average; None for no average.
    """

    components: tuple[tuple[str, ComponentOptimizer], ...]
    ema_decay: float | None = None

    @property
    def trained_keys(self) -> tuple[str, ...]:
        """The params keys that are not frozen: those of the reference."""
        return tuple(key for key, component in self.components if component.mode != "frozen")

    def check(self, system: CompoundSystem) -> None:
        """Check that components and optimisers go together.

        Args:
            system: Whose components are trained.

        Raises:
            OptimizerError: Naming the components that lack an optimiser, or the optimisers that lack one; if none is
                trained.
        """
        named = {key for key, _ in self.components}
        missing, unknown = set(system.param_keys) - named, named - set(system.param_keys)
        if missing or unknown:
            raise OptimizerError(
                f"every component needs a ComponentOptimizer (or FROZEN); missing: {sorted(missing) or 'none'}, "
                f"not in the system: {sorted(unknown) or 'none'}"
            )
        if not self.trained_keys:
            raise OptimizerError("every component is frozen: train at least one")

    def mask(self, system: CompoundSystem, params: Params) -> PyTree:
        """Which leaves are trained: those of `trainable` that no component of the system declares `frozen`.

        Args:
            system: Whose components are trained.
            params: `{params_key: tree}`.

        Returns:
            A tree like `params` of True and False.

        Raises:
            OptimizerError: If a component that is not frozen trains none, and if weights that roles share are trained.
        """
        masks = {}
        for key, component in self.components:
            nodes = [node for node in system.nodes if node.has_params and node.params_key == key]
            frozen = tuple(part for node in nodes for part in node.component.frozen)
            masks[key] = jax.tree_util.tree_map_with_path(partial(_is_trained, component, frozen), params[key])
            if component.mode != "frozen" and not any(jax.tree.leaves(masks[key])):
                besides = f" beside its frozen parts {', '.join(frozen)}" if frozen else ""
                raise OptimizerError(
                    f"trainable={component.trainable!r} matches no parameter of {key!r}{besides}: fix the pattern or "
                    "use FROZEN"
                )
        for node in system.nodes:
            trained = () if node.base is None else (path for path, kept in by_path(masks[node.base]).items() if kept)
            for path in trained:
                if not is_lora(path):
                    raise OptimizerError(
                        f"{path} of {node.base!r}, the base of {node.params_key!r}, would be trained, but roles share "
                        "its weights: train its LoRA factors alone (trainable=LORA_PARAMS), or use FROZEN"
                    )
        return masks

    @property
    def transformation(self) -> optax.GradientTransformation:
        """That of all components together, of `{params_key: trained leaves}`."""
        transformations = {key: component.transformation for key, component in self.components}
        return optax.partition(transformations, {key: key for key in transformations})

    def norms(self, gradients: Params) -> dict[str, Float[Array, ""]]:
        """How long the gradients are, before clipping.

        Args:
            gradients: Of the trained leaves.

        Returns:
            `{params_key: global norm, in float32}` of the components that are not frozen.
        """
        return {key: optax.tree.norm(_in_float32(gradients[key])) for key in self.trained_keys}

    def clipped(self, norms: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """Which gradients the clip shortens.

        Args:
            norms: As `norms` returns them.

        Returns:
            `{params_key: 1 where it does, else 0}` of the components with a clip.
        """
        limits = {key: component.clip_norm for key, component in self.components if key in norms}
        return {key: (norms[key] > limit).astype(jnp.float32) for key, limit in limits.items() if limit is not None}


def make_optimizer(components: Mapping[str, ComponentOptimizer], ema_decay: float | None = None) -> SystemOptimizer:
    """Put the components' optimisers together.

    Args:
        components: `{params_key: ComponentOptimizer}`; every key of the system must be named.
        ema_decay: Keep an exponential moving average of the trained leaves, ema <- d ema + (1 - d) params.

    Returns:
        The optimiser of the whole system.

    Raises:
        OptimizerError: For an ema_decay outside (0, 1).
    """
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise OptimizerError(f"ema_decay must lie in (0, 1), got {ema_decay}: use None for no average")
    return SystemOptimizer(tuple(sorted(components.items())), ema_decay)


def _is_trained(component: ComponentOptimizer, frozen: tuple[str, ...], path: tuple[Any, ...], leaf: Any) -> bool:
    name = path_name(path)
    kept = name.rpartition("/")[2] in CONSTANTS or any(f"{name}/".startswith(f"{part}/") for part in frozen)
    return component.mode != "frozen" and not kept and re.search(component.trainable, name) is not None


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` in float32, whatever the gradients are in."""
    clip = optax.clip_by_global_norm(limit)

    def clipped(gradients: PyTree, params: PyTree) -> PyTree:
        return optax.tree.cast_like(clip.update(_in_float32(gradients), optax.EmptyState())[0], gradients)

    return optax.stateless(clipped)


def _with_state_dtype(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Arrays of real numbers in the state are kept in `dtype`; counts and single numbers stay as they are."""

    def keep(x: Array) -> Array:
        return x.astype(dtype) if jnp.ndim(x) and jnp.issubdtype(x.dtype, jnp.floating) else x

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # The precision that the transformation itself would keep its state in.
        wide = optax.tree.cast_like(state, jax.eval_shape(inner.init, params))
        updates, wide = inner.update(updates, wide, params)
        return updates, jax.tree.map(keep, wide)

    return optax.GradientTransformation(lambda params: jax.tree.map(keep, inner.init(params)), update)


def _with_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates add up in float32 copies of the parameters, which follow them, rounded."""

    def init(params: PyTree) -> MasterState:
        weights = _in_float32(params)
        return MasterState(weights, inner.init(weights))

    def change(new: Array, update: Array, old: Array) -> Array:
        # `optax.apply_updates` adds this in float32 and rounds, which gives the rounded weight.
        return update if old.dtype == new.dtype else new.astype(old.dtype).astype(new.dtype) - old.astype(new.dtype)

    def update(updates: PyTree, state: MasterState, params: PyTree) -> tuple[PyTree, MasterState]:
        updates, inner_state = inner.update(_in_float32(updates), state.inner, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return jax.tree.map(change, weights, updates, params), MasterState(weights, inner_state)

    return optax.GradientTransformation(init, update)


def _in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
