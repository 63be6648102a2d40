"""SysDPO-Direct: one loss for the whole system, when the records hold the intermediate values."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.routed import fold
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.keys import row_keys
from sysdpo_jax.objectives.log_ratio import node_log_probs, repeated, trained_nodes
from sysdpo_jax.objectives.objective import Aux, PreferenceObjective, require_batch, require_trained, total
from sysdpo_jax.typing import Keys, Params


@dataclass(frozen=True)
class DirectObjective(PreferenceObjective):
    """SysDPO-Direct, for records that hold the intermediate values (arXiv 2502.17721, section 4.1).

        loss = -E log sigmoid(beta [sum_k r_k(s^w) - sum_k r_k(s^l)]),   r_k = weight_k (log p_k - log p_ref,k)

    Args:
        beta: Inverse temperature, in 1/nats for language models.
        loss: A name in `LOSSES`: what takes the place of -log sigmoid.
        label_smoothing: Share of labels taken to be wrong, in [0, 0.5).
        sft: (node, coefficient) pairs; each adds coefficient * mean(-log p_node(winner)) to the loss, in the node's own
            units, against falling winner likelihood.

    Raises:
        ValueError: On an unknown loss, or a parameter out of range or that the loss would not read.
    """

    def __call__(
        self, system: CompoundSystem, params: Params, reference: Params, batch: PairBatch, key: Keys
    ) -> tuple[Array, Aux]:
        """Both sides go through each model in one forward pass and share the noise of the key.

        Args:
            system: The graph that is summed over.
            params: The policy, `{params_key: tree}`.
            reference: The same of the trained components before training; a frozen one has no key.
            batch: As `prepare_pairs` and `epoch_batches` make it.
            key: Of the step's noise.

        Returns:
            The mean loss over the batch; the nodes' margins and metrics under TRL's names, see `aux`.
        """
        require_batch(batch, PairBatch, "prepare_pairs")
        rows, sides = jax.tree.leaves(batch)[0].shape[0], batch.sides()
        nodes = trained_nodes(system, reference)
        features = {node.name: fold(node.component, sides[node.name], 2) for node in nodes}
        precomputed = {name: jnp.stack(values, axis=1).reshape(-1) for name, values in (batch.reference or {}).items()}
        keys = repeated(row_keys(key, rows), (2,))
        node_logps = node_log_probs(system, params, reference, features, keys, precomputed)
        node_logps = jax.tree.map(lambda x: x.reshape(rows, 2).T, node_logps)
        require_trained(node_logps)
        log_ratios = total(term.log_ratio for term in node_logps.values())
        logps = total(term.policy for term in node_logps.values())
        return self.mean_loss(log_ratios, node_logps), self.aux(log_ratios, logps, node_logps)
