"""SysDPO-Direct: one loss for the whole system, when the records hold the intermediate values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.objectives.log_ratio import NodeTerms, PairBatch, node_terms
from sysdpo_jax.objectives.losses import LOSSES, SMOOTHED
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class DirectObjective:
    """-E log sigmoid(beta [sum_k r_k(winner) - sum_k r_k(loser)]) and its family (arXiv 2502.17721, section 4.1).

    beta: inverse temperature. loss: a name in `losses.LOSSES`. label_smoothing: share of labels taken to be wrong.
    sft: (node, coefficient) pairs; each adds coefficient * mean(-log p_node(winner)) to the loss, in the node's own
    units (nats for a language model, the weighted surrogate for a diffusion model), against falling winner likelihood.
    Raises `ValueError` on an unknown loss or a parameter that the loss would not read.
    """

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    sft: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"loss {self.loss!r} does not use label_smoothing: set it to 0")

    def __call__(
        self, system: CompoundSystem, params: Params, reference: Params, batch: PairBatch, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss over the batch and scalar metrics under TRL's names, plus their split by node.

        Both sides go through each model in one forward pass and share the noise of the key. Metrics: see `_metrics`.
        """
        pair = jax.tree.map(lambda *sides: jnp.stack(sides), *batch)
        terms = jax.vmap(partial(node_terms, system, params, reference), in_axes=(0, None))(pair, key)
        if not terms:
            raise GraphError("every component is frozen: train at least one (its key must be in the reference)")
        chosen, rejected = _total(term.ratio for term in terms.values())
        losses = LOSSES[self.loss](chosen, rejected, self.beta, self.label_smoothing)
        loss = jnp.mean(losses) + self._sft(terms)
        return loss, {"loss": loss, **self._metrics(terms)}

    def _sft(self, terms: Mapping[str, NodeTerms]) -> Array:
        total = jnp.zeros(())
        for name, coefficient in self.sft:
            if name not in terms:
                raise GraphError(f"sft names the node {name!r}, which is not a trained node: {', '.join(terms)} are")
            total = total - coefficient * jnp.mean(terms[name].policy[0])
        return total

    def _metrics(self, terms: Mapping[str, NodeTerms]) -> dict[str, Array]:
        """TRL's reward metrics of the system, the same by node, and the components' own figures by node and model."""
        chosen, rejected = jax.lax.stop_gradient(self.beta * _total(term.ratio for term in terms.values()))
        logps = _total(term.policy for term in terms.values())
        metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/margins_std": (chosen - rejected).std(),
            "rewards/accuracies": (chosen > rejected).mean(dtype=jnp.float32),
            "logps/chosen": logps[0].mean(),
            "logps/rejected": logps[1].mean(),
        }
        for name, term in terms.items():
            reward = jax.lax.stop_gradient(self.beta * term.ratio)
            metrics[f"rewards/chosen/{name}"] = reward[0].mean()
            metrics[f"rewards/margins/{name}"] = (reward[0] - reward[1]).mean()
            metrics[f"logps/chosen/{name}"] = term.policy[0].mean()
            metrics[f"logps/rejected/{name}"] = term.policy[1].mean()
            for model, values in (("policy", term.policy_metrics), ("reference", term.reference_metrics)):
                metrics |= {f"{metric}/{name}/{model}": value.mean() for metric, value in values.items()}
        return jax.lax.stop_gradient(metrics)


def _total(terms: Iterable[Array]) -> Array:
    """Sum over nodes, in float32 whatever precision a component reports in."""
    return sum((term.astype(jnp.promote_types(term.dtype, jnp.float32)) for term in terms), start=jnp.zeros(()))
