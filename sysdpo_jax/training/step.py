"""The training step: one jitted function for every component, policy and reference together.

What changes (step, trained leaves, optimiser state, average) is donated; what does not (reference, frozen leaves) is
read in place. A step whose loss, gradients or new parameters are not finite changes nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from sysdpo_jax.components.base import row_keys
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.objectives.log_ratio import trained_nodes
from sysdpo_jax.objectives.preference import PreferenceObjective, margin_shares
from sysdpo_jax.training.optimizer import SystemOptimizer, combine
from sysdpo_jax.training.sharding import (
    BATCH_SPEC,
    ShardingError,
    activation_rules,
    batch_parts,
    make_mesh,
    place_batch,
    replicated,
)
from sysdpo_jax.training.state import Carry, Fixed, TrainState, join, split, whole_reference
from sysdpo_jax.typing import Keys, Params

Metrics = dict[str, Array]
Objective = Callable[[CompoundSystem, Params, Params, Any, Keys], tuple[Array, Metrics]]

PROCEED = np.bool_(True)


def make_train_step(
    system: CompoundSystem,
    objective: Objective,
    optimizer: SystemOptimizer,
    mesh: Mesh | None = None,
    accumulate: int = 1,
) -> "TrainStep":
    """`step(state, batch, key) -> (state, metrics)`, see `TrainStep`. mesh: the one the state was created on.

    accumulate: how many parts of a batch go through the models one after the other, which bounds memory; their
    gradients are averaged in float32. Objectives are means over rows and noise is a row's own, so the update is that
    of the whole batch, up to rounding.
    """
    optimizer.check(system)
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 part, got {accumulate}")
    return TrainStep(system, objective, optimizer, make_mesh() if mesh is None else mesh, accumulate)


class TrainStep:
    """One update of every trained component; its placement is that of the first state it sees.

    The old state is consumed. The objective's key is `fold_in(key, state.step)`: pass the same key every time.
    Metrics, all scalars: loss; the objective's own; margin_share/<node>; grad_norm/<params_key> before clipping;
    clipped/<params_key>, 1 where it was clipped; finite (True when the state advanced); finite/<node> (False for a node
    whose term rewards/margins/<node> is not finite or, where all terms are, whose component's gradient is not).
    """

    def __init__(
        self, system: CompoundSystem, objective: Objective, optimizer: SystemOptimizer, mesh: Mesh, accumulate: int
    ):
        self.system, self.objective, self.optimizer, self.mesh = system, objective, optimizer, mesh
        self.accumulate = accumulate
        self._mask: PyTree = None
        self._jitted: dict[Any, Any] = {}

    def __call__(
        self, state: TrainState, batch: PyTree, key: PRNGKeyArray, proceed: Array | np.bool_ = PROCEED
    ) -> tuple[TrainState, Metrics]:
        """proceed: False leaves the state as it is; a driver passes the last step's `finite` to stop without waiting.

        Raises `ShardingError` for a batch that the mesh cannot cut, and `ValueError` for a state on another mesh.
        """
        jitted, carry, fixed = self._prepare(state)
        batch = place_batch(self.mesh, batch)
        # Arrays on and off the mesh have different types to the tracer: place it, or the second step traces again.
        proceed = jax.device_put(proceed, replicated(self.mesh))
        carry, metrics = jitted(carry, fixed, batch, key, proceed)
        return join(carry, fixed), metrics

    def metric_names(self, state: TrainState, batch: PyTree, key: PRNGKeyArray) -> tuple[str, ...]:
        """The metrics of a step, by tracing it: nothing runs, and a call with a batch like this one traces no more.

        Raises what the call would raise for a state, objective and batch that do not go together.
        """
        jitted, carry, fixed = self._prepare(state)
        batch, proceed = place_batch(self.mesh, batch), jax.device_put(PROCEED, replicated(self.mesh))
        return tuple(jitted.eval_shape(carry, fixed, batch, key, proceed)[1])

    def check(self, state: TrainState, rows: int) -> None:
        """What can be said against batches before there is one. rows: of a batch, of all processes together.

        Raises `ShardingError` where the mesh and `accumulate` do not cut them, and `GraphError` where the loss does not
        go with the system.
        """
        self._check_rows(rows)
        if isinstance(self.objective, PreferenceObjective):
            self.objective.check([node.name for node in trained_nodes(self.system, state.reference)])

    def _check_rows(self, rows: int) -> None:
        shares = batch_parts(self.mesh)
        if rows % (self.accumulate * shares):
            raise ShardingError(
                f"{rows} rows cannot be cut into {self.accumulate} equal parts on each of {shares} places (data x fsdp)"
                f": make the batch a multiple of {self.accumulate * shares}, or change accumulate"
            )

    def lower(self, state: TrainState, batch: PyTree, key: PRNGKeyArray) -> jax.stages.Lowered:
        """The lowered step, to read its memory analysis or to compile ahead of time; nothing runs."""
        jitted, carry, fixed = self._prepare(state)
        return jitted.lower(carry, fixed, batch, key, PROCEED)

    def _prepare(self, state: TrainState) -> tuple[Any, Carry, Fixed]:
        if self._mask is None:
            self._mask = self.optimizer.mask(state.params, self.system)
        parts = split(state, self._mask)
        # A state whose reference shares other leaves with its parameters is another set of arguments.
        structure = jax.tree.structure(parts)
        if structure not in self._jitted:
            self._jitted[structure] = self._jit(*parts)
        return self._jitted[structure], *parts

    def _jit(self, carry: Carry, fixed: Fixed) -> Any:
        carries, fixes = jax.tree.map(self._sharding, (carry, fixed))
        whole = replicated(self.mesh)
        return jax.jit(
            partial(self._update, carries.trained),
            donate_argnums=0,
            in_shardings=(carries, fixes, NamedSharding(self.mesh, BATCH_SPEC), whole, whole),
            out_shardings=(carries, whole),
        )

    def _sharding(self, leaf: Any) -> NamedSharding:
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh != self.mesh:
            raise ValueError("the state is not on the step's mesh: give create_state and make_train_step the same mesh")
        return sharding

    def _update(
        self,
        placement: PyTree,
        carry: Carry,
        fixed: Fixed,
        batch: PyTree,
        key: PRNGKeyArray,
        proceed: Bool[Array, ""],
    ) -> tuple[Carry, Metrics]:
        def loss_of(trained: Params, part: PyTree, key: Keys) -> tuple[Array, Metrics]:
            params, reference = combine(trained, fixed.frozen), whole_reference(fixed)
            return self.objective(self.system, params, reference, part, key)

        step_key = jax.random.fold_in(key, carry.step)
        with activation_rules(self.mesh):
            (loss, metrics), gradients = self._gradients(loss_of, placement, carry.trained, batch, step_key)
        trained, opt_state, norms = self.optimizer.update(gradients, carry.opt_state, carry.trained)
        ema = _average(carry.ema, trained, self.optimizer.ema_decay)
        finite = jnp.isfinite(loss) & _all_finite(norms) & _all_finite(trained)
        good = finite & proceed
        new = Carry(carry.step + 1, trained, opt_state, ema)
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, carry)
        metrics = {"loss": loss} | metrics | margin_shares(metrics)
        metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        metrics |= {f"clipped/{name}": value for name, value in self.optimizer.clipped(norms).items()}
        return kept, metrics | {"finite": good} | self._finite_nodes(metrics)

    def _gradients(
        self,
        loss_of: Callable[..., tuple[Array, Metrics]],
        placement: PyTree,
        trained: Params,
        batch: PyTree,
        key: PRNGKeyArray,
    ) -> tuple[tuple[Array, Metrics], Params]:
        """((loss, metrics), gradients) of the batch, part by part where `accumulate` says so."""

        def value_and_grad(trained: Params, part: PyTree, key: Keys) -> tuple[tuple[Array, Metrics], Params]:
            values, gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, part, key)
            # Summed over the devices into each one's own part, as soon as they are made.
            return values, jax.lax.with_sharding_constraint(gradients, placement)

        if self.accumulate == 1:
            return value_and_grad(trained, batch, key)
        rows = jax.tree.leaves(batch)[0].shape[0]
        self._check_rows(rows)
        cut = NamedSharding(self.mesh, PartitionSpec(None, *BATCH_SPEC))

        def parts(x: Array) -> Array:
            # Every device gives a share of its own rows to each part, so that none moves.
            by_part = jnp.swapaxes(x.reshape(rows // self.accumulate, self.accumulate, *x.shape[1:]), 0, 1)
            return jax.lax.with_sharding_constraint(by_part, cut)

        def add(total: Params, part: tuple[PyTree, Keys]) -> tuple[Params, tuple[Array, Metrics]]:
            values, gradients = value_and_grad(trained, *part)
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype) / self.accumulate, total, gradients), values

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), trained)
        gradients, values = jax.lax.scan(add, zeros, jax.tree.map(parts, (batch, row_keys(key, rows))))
        return jax.tree.map(lambda x: x.mean(0), values), gradients

    def _finite_nodes(self, metrics: Metrics) -> Metrics:
        """A bad term spoils every gradient, so gradients are blamed only when all terms are finite."""
        names = {n.name: n.params_key for n in self.system.nodes if f"rewards/margins/{n.name}" in metrics}
        terms = {name: jnp.isfinite(metrics[f"rewards/margins/{name}"]) for name in names}
        all_terms = _all_finite({name: metrics[f"rewards/margins/{name}"] for name in names})
        gradients = {name: jnp.isfinite(metrics.get(f"grad_norm/{key}", 0.0)) for name, key in names.items()}
        return {f"finite/{name}": jnp.where(all_terms, gradients[name], terms[name]) for name in names}


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _average(ema: Params | None, trained: Params, decay: float | None) -> Params | None:
    if ema is None or decay is None:
        return ema
    return jax.tree.map(lambda average, leaf: decay * average + (1 - decay) * leaf.astype(jnp.float32), ema, trained)
