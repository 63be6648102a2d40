"""One optimiser for the whole system: per component a transformation, a clip, and which leaves are trained.

Partitioned trees keep the structure of the parameters, with None where the other part has the leaf: None holds no
array, so gradients and optimiser memory exist for trained leaves only.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.training.sharding import path_name
from sysdpo_jax.typing import Params

# Leaves that no training changes, whatever the pattern: an optimiser's weight decay would, without any gradient.
CONSTANTS = frozenset({"lora_scale", "pos_embed"})


class OptimizerError(ValueError):
    """The optimiser does not fit the system: the message names the component and the remedy."""


@dataclass(frozen=True)
class ComponentOptimizer:
    """How one parameter tree is trained.

    optimizer: any optax transformation, its learning rate included. clip_norm: largest global norm of the component's
    gradient, None for no clipping. mode: "frozen" keeps the tree as it is, out of reference and optimiser memory.
    trainable: regex found in the "/"-joined path below the params key; leaves that it misses are not trained,
    nor are the constants of a model (LoRA's scale, a fixed table of positions) and frozen entries (an autoencoder).
    master_weights: keep float32 copies of trained leaves of less precision, which updates add up in; the parameters
    are these, rounded. state_dtype: precision that the optimiser's arrays (moments) are kept in between updates, which
    compute in that of the optimiser; by default both are the same.
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


class MasterState(NamedTuple):
    """The optimiser's state of a component with master weights: those, in float32, and the transformation's own."""

    weights: Params
    inner: PyTree


FROZEN = ComponentOptimizer(optax.set_to_zero(), mode="frozen")


@dataclass(frozen=True)
class SystemOptimizer:
    """Made by `make_optimizer`. components: (params_key, ComponentOptimizer) pairs; ema_decay: None for no average."""

    components: tuple[tuple[str, ComponentOptimizer], ...]
    ema_decay: float | None = None

    @property
    def trained_keys(self) -> tuple[str, ...]:
        """The params keys that are not frozen: those of the reference."""
        return tuple(key for key, component in self.components if component.mode != "frozen")

    def check(self, system: CompoundSystem) -> None:
        """Raise `OptimizerError` naming the components that lack an optimiser, or the optimisers that lack one."""
        named = {key for key, _ in self.components}
        missing, unknown = set(system.param_keys) - named, named - set(system.param_keys)
        if missing or unknown:
            raise OptimizerError(
                f"every component needs a ComponentOptimizer (or FROZEN); missing: {sorted(missing) or 'none'}, "
                f"not in the system: {sorted(unknown) or 'none'}"
            )
        if not self.trained_keys:
            raise OptimizerError("every component is frozen: train at least one")

    def mask(self, params: Params, system: CompoundSystem) -> PyTree:
        """True for each trained leaf; `Component.frozen` entries have none.

        Raises `OptimizerError` when a component that is not frozen trains none.
        """
        masks = {}
        for key, component in self.components:
            apart = {name for node in system.nodes if node.params_key == key for name in node.component.frozen}
            masks[key] = _matches(params[key], component, apart)
            if component.mode != "frozen" and not any(jax.tree.leaves(masks[key])):
                raise OptimizerError(
                    f"trainable={component.trainable!r} matches no parameter of {key!r}: mend the pattern or use FROZEN"
                )
        return masks

    def init(self, trained: Params) -> dict[str, PyTree]:
        """The optimiser states `{params_key: state}` of the trained leaves."""
        return {key: _init(component, trained[key]) for key, component in self._active()}

    def update(
        self, gradients: Params, opt_state: Mapping[str, PyTree], trained: Params
    ) -> tuple[Params, dict[str, PyTree], dict[str, Float[Array, ""]]]:
        """New trained leaves and states, and `{params_key: gradient norm}` before clipping.

        The clip is g * min(1, clip_norm / ||g||), with the norm over the component's trained leaves in float32.
        """
        leaves, states, norms = dict(trained), {}, {}
        for key, component in self._active():
            norms[key] = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients[key]))
            clipped = _clip(gradients[key], norms[key], component.clip_norm)
            leaves[key], states[key] = _advance(component, clipped, opt_state[key], trained[key])
        return leaves, states, norms

    def clipped(self, norms: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """`{params_key: 1 where the clip shortened a gradient of this norm, else 0}` of the components with a clip."""
        limits = {key: component.clip_norm for key, component in self._active()}
        return {key: (norms[key] > limit).astype(jnp.float32) for key, limit in limits.items() if limit is not None}

    def _active(self) -> list[tuple[str, ComponentOptimizer]]:
        return [(key, component) for key, component in self.components if component.mode != "frozen"]


def make_optimizer(components: Mapping[str, ComponentOptimizer], ema_decay: float | None = None) -> SystemOptimizer:
    """One optimiser from `{params_key: ComponentOptimizer}`; every key of the system must be named.

    ema_decay: keep an exponential moving average of the trained leaves, ema <- d ema + (1 - d) params.
    """
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise OptimizerError(f"ema_decay must lie in (0, 1), got {ema_decay}: use None for no average")
    return SystemOptimizer(tuple(sorted(components.items())), ema_decay)


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """(leaves where the mask is True, the others), each with None in the places of the other."""
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, x: None if keep else x, mask, tree)
    return kept, rest


def combine(first: PyTree, second: PyTree) -> PyTree:
    """Undo `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def _matches(tree: Params, component: ComponentOptimizer, apart: Collection[str]) -> PyTree:
    def matches(path: tuple[Any, ...], leaf: Any) -> bool:
        name = path_name(path)
        trained = component.mode != "frozen" and re.search(component.trainable, name) is not None
        return trained and name.rpartition("/")[2] not in CONSTANTS and name.partition("/")[0] not in apart

    return jax.tree_util.tree_map_with_path(matches, tree)


def _init(component: ComponentOptimizer, trained: Params) -> PyTree:
    weights = _in_float32(trained) if component.master_weights else trained
    inner = _narrow(component.optimizer.init(weights), component.state_dtype)
    return MasterState(weights, inner) if component.master_weights else inner


def _advance(component: ComponentOptimizer, gradients: Params, state: PyTree, trained: Params) -> tuple[Params, PyTree]:
    """One update: new leaves and state."""
    weights, inner = state if component.master_weights else (trained, state)
    if component.master_weights:
        gradients = _in_float32(gradients)
    # The precision that the transformation itself would keep its state in.
    own = jax.eval_shape(component.optimizer.init, weights)
    wide = jax.tree.map(lambda x, like: x.astype(like.dtype), inner, own)
    updates, wide = component.optimizer.update(gradients, wide, weights)
    weights = optax.apply_updates(weights, updates)
    inner = _narrow(wide, component.state_dtype)
    if not component.master_weights:
        return weights, inner
    rounded = jax.tree.map(lambda new, old: new.astype(old.dtype), weights, trained)
    return rounded, MasterState(weights, inner)


def _in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _narrow(state: PyTree, dtype: str | None) -> PyTree:
    """Arrays of real numbers in `dtype`; counts and single numbers stay as they are."""

    def keep(x: Array) -> Array:
        return x.astype(dtype) if jnp.ndim(x) and jnp.issubdtype(x.dtype, jnp.floating) else x

    return state if dtype is None else jax.tree.map(keep, state)


def _clip(gradients: PyTree, norm: Float[Array, ""], limit: float | None) -> PyTree:
    if limit is None:
        return gradients
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
