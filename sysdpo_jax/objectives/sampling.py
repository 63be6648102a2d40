"""SysDPO-Sampling: the loss when the records hold final values only, and the intermediates are searched for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.components.base import as_rows
from sysdpo_jax.components.routed import fold
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.keys import row_keys
from sysdpo_jax.objectives.log_ratio import NodeLogps, log_probs_of_node, repeated, trained_nodes
from sysdpo_jax.objectives.objective import Aux, PreferenceObjective, require_batch, require_trained, total
from sysdpo_jax.typing import Features, Keys, Params

# {node: its log-probabilities}, each array [M, 2, batch]: intermediates, sides, rows.
Terms = dict[str, NodeLogps]


@dataclass(frozen=True)
class SamplingObjective(PreferenceObjective):
    """The losses of `DirectObjective` with p(z | x) summed over a set Y(x) of intermediates (arXiv 2502.17721, 4.2).

        log p(z | x) ~= logsumexp_{y in Y(x)} [log p(y | x) + log p(z | x, y)],   the same Y(x) under the reference

    A node's weight multiplies its log-probability here. The log-ratio is computed as the equal
    logsumexp_y [log w_y + log p(y, z | x) / p_ref(y, z | x)] with w the softmax of log p_ref(y, z | x): the difference
    of two large numbers is never taken, and with one intermediate it is SysDPO-Direct's.

    A frozen component is evaluated too: its probabilities weigh the intermediates. A node's figures, and its `sft`, are
    means over the intermediates with their posterior p(y | x, z) as weights; the nodes' margins do not add up to the
    system's, as those of SysDPO-Direct do. A diffusion node's surrogate weighs intermediates too, by one draw of its
    noise: where its scale (the component's weighting times the node's weight) is large, one intermediate gets all the
    weight. Watch the effective number.

    Args:
        beta: As for `DirectObjective`.
        loss: As for `DirectObjective`.
        label_smoothing: As for `DirectObjective`.
        sft: As for `DirectObjective`.
        chunk_size: How many intermediates are evaluated at once, which bounds memory at the price of a second forward
            pass; all of them by default.

    Raises:
        ValueError: As for `DirectObjective`, and for a chunk_size below 1.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 intermediate, got {self.chunk_size}")

    def __call__(
        self, system: CompoundSystem, params: Params, reference: Params, batch: SampledBatch, key: Keys
    ) -> tuple[Array, Aux]:
        """All sides and intermediates share the noise of the key.

        Args:
            system: The graph that is summed over.
            params: The policy, `{params_key: tree}`.
            reference: The same of the trained components before training; a frozen one has no key.
            batch: As `SearchedBatches` and `sampled_batch` make it.
            key: Of the step's noise.

        Returns:
            The mean loss over the batch; the nodes' margins and the metrics of `DirectObjective`, with
            intermediates/effective/<side>, the effective number 1 / sum of squared posterior weights,
            intermediates/distinct, and intermediates/staleness in steps.
        """
        require_batch(batch, SampledBatch, "SearchedBatches")
        system.check_params(params)
        node_logps = self._node_logps(system, params, reference, batch, key)
        trained = {node.name: node_logps[node.name] for node in trained_nodes(system, reference)}
        require_trained(trained)
        base = total(node.weight * node_logps[node.name].reference for node in _generative(system))
        # What the reference cannot give has no weight, and no difference to it.
        valid = batch.valid.T[:, None, :] & (base > -jnp.inf)
        change = jnp.where(valid, total(term.log_ratio for term in trained.values()), 0)
        prior = jax.lax.stop_gradient(jax.nn.log_softmax(jnp.where(valid, base, -jnp.inf), axis=0))
        log_ratios = jax.nn.logsumexp(prior + change, axis=0)
        posterior = jax.lax.stop_gradient(jnp.exp(prior + change - log_ratios))
        means = jax.tree.map(lambda x: jnp.sum(posterior * jnp.where(valid, x, 0), axis=0), trained)
        logps = jax.nn.logsumexp(jnp.where(valid, base + change, -jnp.inf), axis=0)
        effective = 1 / jnp.sum(posterior**2, axis=0)
        aux = self.aux(log_ratios, logps, means)
        searched = {
            "intermediates/effective/chosen": effective[0].mean(),
            "intermediates/effective/rejected": effective[1].mean(),
            "intermediates/distinct": batch.valid.sum(axis=1).mean(dtype=jnp.float32),
            "intermediates/staleness": batch.staleness.mean(dtype=jnp.float32),
        }
        return self.mean_loss(log_ratios, means), aux._replace(metrics={**aux.metrics, **searched})

    def _node_logps(
        self, system: CompoundSystem, params: Params, reference: Params, batch: SampledBatch, key: Keys
    ) -> Terms:
        keys = row_keys(key, batch.valid.shape[0])

        def evaluated(intermediates: Features, outputs: PairBatch) -> Terms:
            """The log-probabilities [m, 2, batch] with m intermediates for every row, features [batch, m, ...]."""
            number = jax.tree.leaves(intermediates)[0].shape[1]
            # [batch, 2, m, ...] -> [batch, m, 2, ...]
            sides = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), outputs.sides())
            node_logps = {}
            for node in _generative(system):
                inner = node.name in intermediates
                counts = (number,) if inner else (number, 2)
                # An intermediate's parents are those of its row; those of a final value hold its intermediates too.
                given = intermediates[node.name] if inner else as_rows(sides[node.name], 2)
                features = fold(node.component, given, 2)
                values = log_probs_of_node(system, node, params, reference, features, repeated(keys, counts))
                # An intermediate is the same on both sides.
                by_row = jax.tree.map(lambda x, last=1 if inner else 2: x.reshape(len(keys), number, last), values)
                node_logps[node.name] = jax.tree.map(
                    lambda x: jnp.broadcast_to(x, (len(keys), number, 2)).transpose(1, 2, 0), by_row
                )
            return node_logps

        features = batch.intermediates, batch.outputs
        total_number, size = batch.valid.shape[1], self.chunk_size
        if size is None or size >= total_number:
            return evaluated(*features)
        # Without the checkpoint every chunk's activations would wait for the backward pass.
        again = jax.checkpoint(evaluated)
        whole = total_number // size
        cut = lambda x: jnp.moveaxis(x[:, : whole * size].reshape(len(x), whole, size, *x.shape[2:]), 1, 0)  # noqa: E731
        made = jax.lax.map(lambda chunk: again(*chunk), jax.tree.map(cut, features))
        node_logps = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), made)
        if whole * size == total_number:
            return node_logps
        rest = again(*jax.tree.map(lambda x: x[:, whole * size :], features))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), node_logps, rest)


def _generative(system: CompoundSystem) -> tuple[Node, ...]:
    return tuple(node for node in system.nodes if not node.deterministic)
