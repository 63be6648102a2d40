"""SysDPO-Sampling: the loss when the records hold final values only, and the intermediates are searched for."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.objectives.log_ratio import NodeTerms, PairBatch, SampledBatch, terms_of_node, trained_nodes
from sysdpo_jax.objectives.preference import PreferenceObjective, require_batch, require_trained, total
from sysdpo_jax.typing import Features, Keys, Params

# {node: terms}, each array [M, 2, batch]: intermediates, sides, rows.
Terms = dict[str, NodeTerms]


@dataclass(frozen=True)
class SamplingObjective(PreferenceObjective):
    """The losses of `DirectObjective` with p(z | x) summed over a set Y(x) of intermediates (arXiv 2502.17721, 4.2).

        log p(z | x) ~= logsumexp_{y in Y(x)} [log p(y | x) + log p(z | x, y)],   the same Y(x) under the reference

    A node's weight multiplies its log-probability here. The log-ratio is computed as the equal
    logsumexp_y [log w_y + log p(y, z | x) / p_ref(y, z | x)] with w the softmax of log p_ref(y, z | x): the difference
    of two large numbers is never taken, and with one intermediate it is SysDPO-Direct's.

    chunk_size: how many intermediates are evaluated at once, which bounds memory at the price of a second forward pass;
    all of them by default. A frozen component is evaluated too: its probabilities weigh the intermediates.
    A node's figures, and its `sft`, are means over the intermediates with their posterior p(y | x, z) as weights; the
    nodes' margins do not add up to the system's, as those of SysDPO-Direct do.
    A diffusion node's surrogate weighs intermediates too, by one draw of its noise: where its scale (the component's
    weighting times the node's weight) is large, one intermediate gets all the weight. Watch the effective number.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 intermediate, got {self.chunk_size}")

    def __call__(
        self, system: CompoundSystem, params: Params, reference: Params, batch: SampledBatch, key: Keys
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss over the batch and the metrics of `DirectObjective`.

        All sides and intermediates share the noise of the key. More metrics: intermediates/effective/<side>, the
        effective number 1 / sum of squared posterior weights; intermediates/distinct; intermediates/staleness in steps.
        """
        require_batch(batch, SampledBatch, "SearchedBatches")
        system.check_params(params)
        terms = self._terms(system, params, reference, batch, key)
        trained = {node.name: terms[node.name] for node in trained_nodes(system, reference)}
        require_trained(trained)
        base = total(node.weight * terms[node.name].reference for node in _generative(system))
        # What the reference cannot give has no weight, and no difference to it.
        valid = batch.valid.T[:, None, :] & (base > -jnp.inf)
        change = jnp.where(valid, total(term.ratio for term in trained.values()), 0)
        prior = jax.lax.stop_gradient(jax.nn.log_softmax(jnp.where(valid, base, -jnp.inf), axis=0))
        ratios = jax.nn.logsumexp(prior + change, axis=0)
        posterior = jax.lax.stop_gradient(jnp.exp(prior + change - ratios))
        means = jax.tree.map(lambda x: jnp.sum(posterior * jnp.where(valid, x, 0), axis=0), trained)
        logps = jax.nn.logsumexp(jnp.where(valid, base + change, -jnp.inf), axis=0)
        loss = self.mean_loss(ratios, means)
        effective = 1 / jnp.sum(posterior**2, axis=0)
        return loss, {
            "loss": loss,
            **self.metrics(ratios, logps, means),
            "intermediates/effective/chosen": effective[0].mean(),
            "intermediates/effective/rejected": effective[1].mean(),
            "intermediates/distinct": batch.valid.sum(axis=1).mean(dtype=jnp.float32),
            "intermediates/staleness": batch.staleness.mean(dtype=jnp.float32),
        }

    def _terms(
        self, system: CompoundSystem, params: Params, reference: Params, batch: SampledBatch, key: Keys
    ) -> Terms:
        def one(intermediates: Features, outputs: PairBatch) -> Terms:
            """The terms [2, batch] with one intermediate for every row."""
            pair, _ = outputs.stacked()
            terms = {}
            for node in _generative(system):
                of_node = partial(_terms_of_node, system, node, params, reference, key=key)
                if node.name in intermediates:
                    # It is the same on both sides.
                    terms[node.name] = jax.tree.map(lambda x: jnp.stack([x, x]), of_node(intermediates[node.name]))
                else:
                    terms[node.name] = jax.vmap(of_node)(pair[node.name])
            return terms

        by_intermediate = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (batch.intermediates, batch.outputs))
        if self.chunk_size is None or self.chunk_size >= batch.valid.shape[1]:
            return jax.vmap(one)(*by_intermediate)
        # Without the checkpoint every chunk's activations would wait for the backward pass.
        again = jax.checkpoint(one)
        return jax.lax.map(lambda features: again(*features), by_intermediate, batch_size=self.chunk_size)


def _generative(system: CompoundSystem) -> tuple[Node, ...]:
    return tuple(node for node in system.nodes if not node.deterministic)


def _terms_of_node(
    system: CompoundSystem, node: Node, params: Params, reference: Params, features: Features, key: Keys
) -> NodeTerms:
    """The terms [batch] of a trained node, or of a frozen one, which is evaluated once and without gradient."""
    if node.params_key in reference:
        return terms_of_node(system, node, params, reference, features, key)
    frozen = jax.lax.stop_gradient(params[node.params_key])
    log_prob, metrics = system.node_log_prob(node, frozen, features, key)
    return NodeTerms(jnp.zeros_like(log_prob), log_prob, log_prob, metrics, metrics)
