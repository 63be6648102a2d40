"""What an objective is, and what SysDPO-Direct and SysDPO-Sampling share: settings, the loss, metrics and their split.

An objective is a function of a system's parameters and a batch that gives a loss and what goes with it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.errors import meant
from sysdpo_jax.graph import CompoundSystem, GraphError
from sysdpo_jax.objectives.log_ratio import NodeLogps
from sysdpo_jax.objectives.losses import LOSSES, SMOOTHED
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Keys, Params

Scalar = Float[Array, ""]
Sides = Float[Array, "2 batch"]


class Aux(NamedTuple):
    """What an objective returns beside its loss. All are means over the rows: those of parts of a batch are averaged.

    Attributes:
        terms: `{node: mean margin of its reward}`, which the step computes with: each node's share of the margin, and
            the node to blame for a value that is not finite; empty for an objective without such a split.
        metrics: `{name: scalar}`, which is logged; nothing is computed from it.
    """

    terms: Mapping[str, Scalar]
    metrics: Mapping[str, Scalar]


# (system, params, reference, batch, key) -> (loss, Aux), with the parameters and the reference as `{params_key: tree}`.
Objective: TypeAlias = Callable[[CompoundSystem, Params, Params, Any, Keys], tuple[Scalar, Aux]]


def margin_shares(terms: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`{node: |its margin| over the sum of these}`: 0 while no node has a margin.

    terms: of a whole batch, because shares of its parts do not average to its own.
    """
    sizes = {name: jnp.abs(margin) for name, margin in terms.items()}
    whole = sum(sizes.values(), start=jnp.zeros(()))
    return {name: jnp.where(whole > 0, size / whole, 0) for name, size in sizes.items()}


@dataclass(frozen=True)
class PreferenceObjective:
    """Settings of a loss on preferences.

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
        hold_tuples(self)
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: {meant(self.loss, LOSSES)}")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"loss {self.loss!r} does not use label_smoothing: set it to 0")

    def mean_loss(self, log_ratios: Sides, node_logps: Mapping[str, NodeLogps]) -> Scalar:
        """The loss on both sides of every pair, plus the nodes' sft terms.

        Args:
            log_ratios: The system's, of the chosen and the rejected side.
            node_logps: Of every trained node, each array [2, batch].

        Returns:
            The mean over the batch.

        Raises:
            GraphError: As `check`.
        """
        self.check(node_logps)
        losses = LOSSES[self.loss](*log_ratios, self.beta, self.label_smoothing)
        return jnp.mean(losses) - total(sft * jnp.mean(node_logps[name].policy[0]) for name, sft in self.sft)

    def check(self, trained: Collection[str]) -> None:
        """Check that the loss and the system go together.

        Args:
            trained: Names of the trained nodes.

        Raises:
            GraphError: Where the loss names other nodes.
        """
        for name, _ in self.sft:
            if name not in trained:
                raise GraphError(f"sft names the node {name!r}, which is not a trained node: {', '.join(trained)} are")

    def aux(self, log_ratios: Sides, logps: Sides, node_logps: Mapping[str, NodeLogps]) -> Aux:
        """The nodes' margins; as metrics TRL's of the system and by node, drift, and the components' own by model.

        drift/<kind>/<node>, how far the node has gone from its reference on the values at hand, both sides: "mse", the
        rise of the squared error, of a node whose component reports one; else "kl", the mean of (log p - log p_ref)^2 /
        2 in nats, which is a KL divergence to second order in the log-ratio where the values are like the reference's
        own (k2 of J. Schulman, http://joschu.net/blog/kl-approx.html) and above it further away. k1, the plain mean,
        cancels where the chosen rise as the rejected fall; k3 overflows on the log-ratios of whole texts.

        Args:
            log_ratios: The system's, of the chosen and the rejected side.
            logps: The policy's log-probabilities of these.
            node_logps: Of every trained node, each array [2, batch].

        Returns:
            Means over the batch, without gradient.
        """
        chosen, rejected = self.beta * log_ratios
        margins = {}
        metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/margins_squared": jnp.square(chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).mean(dtype=jnp.float32),
            "logps/chosen": logps[0].mean(),
            "logps/rejected": logps[1].mean(),
        }
        for name, term in node_logps.items():
            reward = self.beta * term.log_ratio
            margins[name] = (reward[0] - reward[1]).mean()
            metrics[f"rewards/chosen/{name}"] = reward[0].mean()
            metrics[f"rewards/margins/{name}"] = margins[name]
            metrics[f"logps/chosen/{name}"] = term.policy[0].mean()
            metrics[f"logps/rejected/{name}"] = term.policy[1].mean()
            metrics |= {f"drift/{kind}/{name}": value for kind, value in _drift(term).items()}
            for model, values in (("policy", term.policy_metrics), ("reference", term.reference_metrics)):
                metrics |= {f"{metric}/{name}/{model}": _mean(value, term.runs) for metric, value in values.items()}
        return jax.lax.stop_gradient(Aux(margins, metrics))


def require_batch(batch: Any, kind: type, source: str) -> None:
    """Raise `TypeError` for the batch of another objective. source: where those of this kind come from."""
    if not isinstance(batch, kind):
        raise TypeError(
            f"the objective takes a {kind.__name__}, as {source} makes it, not a {type(batch).__name__}: "
            "DirectObjective goes with prepare_pairs, SamplingObjective with SearchedBatches"
        )


def require_trained(node_logps: Mapping[str, NodeLogps]) -> None:
    """Raise `GraphError` when no node is trained."""
    if not node_logps:
        raise GraphError("every component is frozen: train at least one (its key must be in the reference)")


def _drift(term: NodeLogps) -> dict[str, Array]:
    if "mse" not in term.policy_metrics:
        return {"kl": _mean(jnp.square(term.policy - term.reference) / 2, jnp.minimum(term.runs, 1))}
    # A reference that was evaluated before left no error behind.
    known = "mse" in term.reference_metrics
    return {"mse": _mean(term.policy_metrics["mse"] - term.reference_metrics["mse"], term.runs)} if known else {}


def _mean(sums: Array, runs: Array) -> Array:
    """The mean over the runs of a node, 0 where there is none; sums: over those of a row."""
    return sums.sum() / jnp.maximum(runs.sum(), 1)


def total(values: Iterable[Array]) -> Array:
    """Sum over nodes, in float32 whatever precision a component reports in."""
    return sum((value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values), start=jnp.zeros(()))
