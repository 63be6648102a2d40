"""The log-ratio of a system: a sum over its nodes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sysdpo_jax.components.routed import number_of_runs
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.roles import evaluate, together
from sysdpo_jax.typing import Features, Keys, Params


class NodeLogps(NamedTuple):
    """One node under policy and reference, one number a row each.

    Attributes:
        log_ratio: weight_k (log p_k - log p_ref,k), in nats.
        policy: log p_k, without the weight.
        reference: log p_ref,k, without the weight.
        policy_metrics: What the component reports beside its log-probability, `{name: value}`.
        reference_metrics: The same under the reference; empty where that was evaluated before.
        runs: How many runs of the node the row has, over which its metrics are summed; 1 where it runs in every row.
    """

    log_ratio: Array
    policy: Array
    reference: Array
    policy_metrics: Mapping[str, Array]
    reference_metrics: Mapping[str, Array]
    runs: Array


def trained_nodes(system: CompoundSystem, reference: Params) -> tuple[Node, ...]:
    """The nodes whose log-ratio can differ from 0: not tools, and not frozen (their key is absent from `reference`)."""
    return tuple(node for node in system.nodes if node.has_params and node.params_key in reference)


def node_log_probs(
    system: CompoundSystem,
    params: Params,
    reference: Params,
    features: Mapping[str, Features],
    key: Keys,
    precomputed: Mapping[str, Array] | None = None,
) -> dict[str, NodeLogps]:
    """Every trained node under policy and reference. No gradient flows into the reference; both see the same noise.

    Args:
        system: The graph that is summed over.
        params: The policy, `{params_key: tree}`.
        reference: The same before training, without the frozen components.
        features: `{node: features}`, encoded.
        key: One for all rows, or one a row.
        precomputed: `{node: log-probabilities [batch]}` under the reference, of the nodes whose reference tree is None.

    Returns:
        `{node: NodeLogps}`.
    """
    system.check_params(params)
    nodes, found = trained_nodes(system, reference), dict[str, NodeLogps]()
    for group in together(nodes, params, features):
        found |= _log_probs(system, group, params, reference, features, key, precomputed or {})
    return {node.name: found[node.name] for node in nodes}


def repeated(keys: Keys, counts: tuple[int, ...]) -> Keys:
    """Each preference's key for all of its rows, in the order of `Component.fold_runs`: [batch] -> [batch * counts]."""
    return jnp.broadcast_to(keys.reshape(-1, *(1 for _ in counts)), (len(keys), *counts)).reshape(-1)


def log_probs_of_node(
    system: CompoundSystem,
    node: Node,
    params: Params,
    reference: Params,
    features: Features,
    key: Keys,
    precomputed: Array | None = None,
) -> NodeLogps:
    """The log-probabilities of one node. precomputed: its log-probabilities [batch] under the reference.

    A frozen node, whose key is absent from `reference`, is evaluated once and without gradient. Raises `ValueError`
    when the node's reference tree is None and nothing was precomputed.
    """
    if node.params_key not in reference:
        frozen = jax.lax.stop_gradient(node.tree(params))
        log_prob, metrics = system.node_log_prob(node, frozen, features, key)
        return NodeLogps(
            jnp.zeros_like(log_prob), log_prob, log_prob, metrics, metrics, number_of_runs(features, log_prob)
        )
    given = {} if precomputed is None else {node.name: precomputed}
    return _log_probs(system, (node,), params, reference, {node.name: features}, key, given)[node.name]


def _log_probs(
    system: CompoundSystem,
    nodes: tuple[Node, ...],
    params: Params,
    reference: Params,
    features: Mapping[str, Features],
    key: Keys,
    precomputed: Mapping[str, Array],
) -> dict[str, NodeLogps]:
    """Of trained nodes that go through their model together."""
    run = _traced_once(partial(evaluate, system, nodes), (params, features, key))
    policy = run(params, features, key)
    compared = tuple(node for node in nodes if node.name not in precomputed)
    for node in compared:
        if reference[node.params_key] is None:
            raise ValueError(
                f"the reference of {node.params_key!r} was freed, but the batch holds no log-probabilities of the node "
                f"{node.name!r} under it: make the batches from what precompute_reference returns, with DirectObjective"
            )
    # The weights of a base are not trained: those of the policy are the reference's where that holds none.
    known = {**params, **{key: tree for key, tree in reference.items() if tree is not None}}
    known = jax.lax.stop_gradient(known)
    base = run(known, features, key) if compared == nodes else {}
    if compared and compared != nodes:
        base = evaluate(system, compared, known, features, key)
    base |= {name: (precomputed[name], {}) for name in policy if name in precomputed}
    return {
        node.name: NodeLogps(
            node.weight * (policy[node.name][0] - base[node.name][0]),
            policy[node.name][0],
            base[node.name][0],
            policy[node.name][1],
            base[node.name][1],
            number_of_runs(features[node.name], policy[node.name][0]),
        )
        for node in nodes
    }


def _traced_once(function: Callable[..., Any], inputs: PyTree) -> Callable[..., Any]:
    """The function, whose Python runs once for policy and reference of equal shapes where a program is traced.

    What is compiled stays the same: the compiler writes calls out. Outside a trace each call would be compiled.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
    return jax.jit(function) if traced else function


def log_ratio(
    system: CompoundSystem, params: Params, reference: Params, features: Mapping[str, Features], key: Keys
) -> dict[str, Array]:
    """weight_k (log p_k - log p_ref,k) of every node; the plain sum is the system's (arXiv 2502.17721, section 4).

    Args:
        system: The graph that is summed over.
        params: The policy, `{params_key: tree}`.
        reference: The same before training. A key that is absent is a frozen component: its nodes, like tools,
            contribute exactly 0 and are not evaluated.
        features: `{node: features}`, encoded.
        key: One for all rows, or one a row; policy and reference see the same noise.

    Returns:
        `{node: Float[Array, "batch"]}` in nats.
    """
    node_logps = node_log_probs(system, params, reference, features, key)
    batch = jax.tree.leaves(features)[0].shape[0]
    return {n.name: node_logps[n.name].log_ratio if n.name in node_logps else jnp.zeros(batch) for n in system.nodes}
