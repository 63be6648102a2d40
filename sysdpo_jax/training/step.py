"""The training step: one jitted function for every component, policy and reference together.

What changes (step, trained leaves, optimiser state, average) is donated; what does not (reference, frozen leaves) is
read in place. A step whose loss, gradients or new parameters are not finite changes nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from sysdpo_jax.components.routed import of_part
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.keys import row_keys
from sysdpo_jax.models.remat import choosing
from sysdpo_jax.objectives.log_ratio import trained_nodes
from sysdpo_jax.objectives.objective import Aux, Objective, PreferenceObjective, margin_shares
from sysdpo_jax.parallel.sharding import (
    BATCH_SPEC,
    ShardingError,
    activation_rules,
    batch_parts,
    make_mesh,
    place_batch,
    replicated,
)
from sysdpo_jax.training.compiling import CANDIDATES, COMPILER_OPTIONS, OF_SEVERAL, fastest_that_fits, room
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.state import Fixed, Mutable, TrainState
from sysdpo_jax.typing import Keys, Params

# What a step returns beside the state: `{name: scalar}`, see `TrainStep`.
StepMetrics: TypeAlias = dict[str, Array]
# Of an objective.
Loss: TypeAlias = tuple[Array, Aux]

PROCEED = np.bool_(True)


def make_train_step(
    system: CompoundSystem,
    objective: Objective,
    optimizer: SystemOptimizer,
    mesh: Mesh | None = None,
    accumulate: int = 1,
) -> "TrainStep":
    """Make the jitted step `(state, batch, key) -> (state, metrics)`.

    Args:
        system: The graph.
        objective: The loss.
        optimizer: From `make_optimizer`.
        mesh: The one the state was created on.
        accumulate: How many parts of a batch go through the models one after the other, which bounds memory; their
            gradients are averaged in float32. Objectives are means over rows and noise is a row's own, so the update is
            that of the whole batch, up to rounding.

    Returns:
        The step.

    Raises:
        ValueError: For an accumulate below 1.
    """
    optimizer.check(system)
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 part, got {accumulate}")
    return TrainStep(system, objective, optimizer, make_mesh() if mesh is None else mesh, accumulate)


class TrainStep:
    """One update of every trained component; its placement is that of the first state it sees.

    Models whose `remat` is "auto" recompute what the first call with batches of a shape decides: the programs are
    compiled, the fastest first, until one fits the devices' memory, and that one runs.

    The old state is consumed. The objective's key is `fold_in(key, state.step)`: pass the same key every time.
    Metrics, all scalars: loss; the objective's own; margin_share/<node>; grad_norm/<params_key> before clipping;
    clipped/<params_key>, 1 where it was clipped; finite (True when the state advanced); finite/<node> (False for a node
    whose term is not finite or, where all terms are, whose component's gradient is not).

    Args:
        system: As for `make_train_step`, which makes it.
        objective: The loss.
        optimizer: From `make_optimizer`.
        mesh: The one the state was created on.
        accumulate: Parts of a batch.
    """

    def __init__(
        self, system: CompoundSystem, objective: Objective, optimizer: SystemOptimizer, mesh: Mesh, accumulate: int
    ):
        self.system, self.objective, self.optimizer, self.mesh = system, objective, optimizer, mesh
        self.accumulate = accumulate
        # Of the structure of a state and what "auto" stands for.
        self._functions: dict[Any, Any] = {}
        # Of shapes of arguments: what "auto" became. Whether a model has it, once the step is traced.
        self._decided: dict[Any, str] = {}
        self._has_auto = False

    def __call__(
        self, state: TrainState, batch: PyTree, key: PRNGKeyArray, proceed: Array | np.bool_ = PROCEED
    ) -> tuple[TrainState, StepMetrics]:
        """Make one update.

        Args:
            state: Is consumed.
            batch: As the objective takes it, encoded.
            key: Of the run.
            proceed: False leaves the state as it is; a driver passes the last step's `finite` to stop without waiting.

        Returns:
            The new state, and the metrics as scalars on the device.

        Raises:
            ShardingError: For a batch that the mesh cannot cut.
            ValueError: For a state on another mesh.
        """
        arguments = self._arguments(state, batch, key, proceed)
        setting = self._setting(state, arguments)
        mutable, metrics = self._traced(state, setting, lambda function: function(*arguments))
        return state.after(mutable), metrics

    def metric_names(self, state: TrainState, batch: PyTree, key: PRNGKeyArray) -> tuple[str, ...]:
        """Trace the step: nothing runs, and a call with a batch like this one traces no more.

        It raises what the call would raise for a state, objective and batch that do not go together.

        Args:
            state: As for a call.
            batch: As for a call.
            key: As for a call.

        Returns:
            The names of its metrics.
        """
        arguments, first = self._arguments(state, batch, key, PROCEED), CANDIDATES[0]
        return tuple(self._traced(state, first, lambda function: function.eval_shape(*arguments))[1])

    def check(self, state: TrainState, rows: int) -> None:
        """What can be said against batches before there is one.

        Args:
            state: As for a call.
            rows: Of a batch, of all processes together.

        Raises:
            ShardingError: Where the mesh and `accumulate` do not cut them.
            GraphError: Where the loss does not go with the system.
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

    def lower(
        self, state: TrainState, batch: PyTree, key: PRNGKeyArray, auto: str = CANDIDATES[0]
    ) -> jax.stages.Lowered:
        """Lower the step; nothing runs.

        Args:
            state: As for a call.
            batch: As for a call.
            key: As for a call.
            auto: What a `remat` of "auto" stands for, the first of `settings` by default.

        Returns:
            What compiles ahead of time, or has its memory analysed.
        """
        arguments = state.mutable, state.fixed, batch, key, PROCEED
        lowered: jax.stages.Lowered = self._traced(state, auto, lambda function: function.lower(*arguments))
        return lowered

    def settings(self, state: TrainState, batch: PyTree, key: PRNGKeyArray) -> tuple[str, ...]:
        """What "auto" may stand for, the fastest first; a single one, of no effect, where no model asks.

        Args:
            state: As for a call.
            batch: As for a call.
            key: As for a call.

        Returns:
            Settings of `remat`.
        """
        return self._asked(state, (state.mutable, state.fixed, batch, key, PROCEED))

    def _arguments(self, state: TrainState, batch: PyTree, key: PRNGKeyArray, proceed: Array | np.bool_) -> Any:
        # Arrays on and off the mesh have different types to the tracer: place it, or the second step traces again.
        proceed = jax.device_put(proceed, replicated(self.mesh))
        return state.mutable, state.fixed, place_batch(self.mesh, batch), key, proceed

    def _setting(self, state: TrainState, arguments: Any) -> str:
        """What "auto" stands for with arguments of these shapes; decided once, by all processes together."""
        batch = arguments[2]
        known = jax.tree.structure((state, batch)), tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
        if known not in self._decided:
            self._decided[known] = self._decide(state, arguments)
        return self._decided[known]

    def _decide(self, state: TrainState, arguments: Any) -> str:
        candidates = self._asked(state, arguments)
        if len(candidates) == 1:
            return candidates[0]
        # A step that still runs holds memory that this one will have.
        jax.block_until_ready(arguments)

        def compiled_as(setting: str) -> jax.stages.Compiled:
            # What a call of the same function takes up: nothing is compiled twice.
            lowered: jax.stages.Lowered = self._traced(state, setting, lambda function: function.lower(*arguments))
            return lowered.compile()

        platform = self.mesh.devices.flat[0].platform
        decision = fastest_that_fits(candidates, compiled_as, lambda program: room(program, self.mesh), platform)
        if jax.process_index() == 0:
            tell(str(decision))
        return decision.setting

    def _asked(self, state: TrainState, arguments: Any) -> tuple[str, ...]:
        self._traced(state, CANDIDATES[0], lambda function: function.trace(*arguments))
        if not self._has_auto:
            return CANDIDATES[:1]
        return OF_SEVERAL if len(trained_nodes(self.system, state.reference)) > 1 else CANDIDATES

    def _traced(self, state: TrainState, setting: str, work: Callable[[Any], Any]) -> Any:
        """work(the jitted step), in which "auto" stands for the setting."""
        function = self._function(state, setting)
        with choosing(setting) as choice:
            made = work(function)
        self._has_auto |= choice.asked
        return made

    def _function(self, state: TrainState, setting: str) -> Any:
        # States that hold the references of other components are other sets of arguments.
        known = jax.tree.structure(state), setting
        if known not in self._functions:
            placed, whole = jax.tree.map(self._sharding, state), replicated(self.mesh)
            batch = NamedSharding(self.mesh, BATCH_SPEC)
            self._functions[known] = jax.jit(
                partial(self._update, placed.trained),
                donate_argnums=0,
                in_shardings=(placed.mutable, placed.fixed, batch, whole, whole),
                out_shardings=(placed.mutable, whole),
                compiler_options=COMPILER_OPTIONS,
            )
        return self._functions[known]

    def _sharding(self, leaf: Any) -> NamedSharding:
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh != self.mesh:
            raise ValueError("the state is not on the step's mesh: give create_state and make_train_step the same mesh")
        return sharding

    def _update(
        self, placement: PyTree, old: Mutable, fixed: Fixed, batch: PyTree, key: PRNGKeyArray, proceed: Bool[Array, ""]
    ) -> tuple[Mutable, StepMetrics]:
        def loss_of(trained: Params, part: PyTree, key: Keys) -> Loss:
            state = TrainState(*old._replace(trained=trained), *fixed)
            made = self.objective(self.system, state.params, state.reference_params, part, key)
            if not isinstance(made, tuple) or [isinstance(x, Aux) for x in made] != [False, True]:
                raise TypeError(f"the objective returned {_kinds(made)}: return (loss, Aux(terms, metrics))")
            return made

        step_key = jax.random.fold_in(key, old.step)
        with activation_rules(self.mesh):
            (loss, aux), gradients = self._gradients(loss_of, placement, old.trained, batch, step_key)
        updates, opt_state = self.optimizer.transformation.update(gradients, old.opt_state, old.trained)
        trained, norms = optax.apply_updates(old.trained, updates), self.optimizer.norms(gradients)
        new = Mutable(old.step + 1, trained, opt_state, _average(old.ema, trained, self.optimizer.ema_decay))
        good = jnp.isfinite(loss) & _all_finite(norms) & _all_finite(trained) & proceed
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, old)
        groups = {
            "margin_share": margin_shares(aux.terms),
            "grad_norm": norms,
            "clipped": self.optimizer.clipped(norms),
            "finite": self._finite_nodes(aux.terms, norms),
        }
        named = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        return kept, {"loss": loss, **aux.metrics, **named, "finite": good}

    def _gradients(
        self, loss_of: Callable[..., Loss], placement: PyTree, trained: Params, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[Loss, Params]:
        """((loss, aux), gradients) of the batch, part by part where `accumulate` says so."""

        def value_and_grad(trained: Params, part: PyTree, key: Keys) -> tuple[Loss, Params]:
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

        def add(total: Params, part: tuple[PyTree, Keys]) -> tuple[Params, Loss]:
            values, gradients = value_and_grad(trained, *part)
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype) / self.accumulate, total, gradients), values

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), trained)
        cut_up = jax.tree.map(parts, (of_part(batch, self.accumulate), row_keys(key, rows)))
        gradients, values = jax.lax.scan(add, zeros, cut_up)
        return jax.tree.map(lambda x: x.mean(0), values), gradients

    def _finite_nodes(
        self, terms: Mapping[str, Float[Array, ""]], norms: Mapping[str, Float[Array, ""]]
    ) -> dict[str, Bool[Array, ""]]:
        """A bad term spoils every gradient, so gradients are blamed only when all terms are finite."""
        gradients = {name: jnp.isfinite(norms.get(self.system.node(name).params_key, 0.0)) for name in terms}
        sound = _all_finite(terms)
        return {name: jnp.where(sound, gradients[name], jnp.isfinite(term)) for name, term in terms.items()}


def _kinds(value: Any) -> str:
    return f"({', '.join(map(_kinds, value))})" if type(value) is tuple else type(value).__name__


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _average(ema: Params | None, trained: Params, decay: float | None) -> Params | None:
    if ema is None or decay is None:
        return ema
    return jax.tree.map(lambda average, leaf: decay * average + (1 - decay) * leaf.astype(jnp.float32), ema, trained)
