"""Which nodes go through their model together: roles of one base, where their lengths allow."""

from collections.abc import Mapping, Sequence

import jax
from jaxtyping import Array, Float

from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.routed import Routed
from sysdpo_jax.components.together import log_probs_together, pays, widths
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.models.lora import in_turns, is_lora
from sysdpo_jax.models.remat import one_at_a_time
from sysdpo_jax.parallel.sharding import batch_parts
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Features, Keys, Params

Evaluated = dict[str, tuple[Float[Array, "batch"], Mapping[str, Float[Array, "batch"]]]]


def together(nodes: Sequence[Node], params: Params, features: Mapping[str, Features]) -> tuple[tuple[Node, ...], ...]:
    """The nodes in groups, each of which `evaluate` takes through its model in one forward pass.

    Several nodes are in a group where they are roles of one base, LoRA factors of its layers and nothing else is their
    own, and `pays` says so: from the shortest on each role joins the group before it or begins another. Where models
    are to be in memory one at a time (`remat` "whole") each goes alone, as do nodes with a plate.

    Args:
        nodes: To be evaluated.
        params: `{params_key: tree}`.
        features: Of each node, as the objective gives them.

    Returns:
        Every node in one group.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts, gathers = (1, False) if mesh.empty else (batch_parts(mesh), mesh.shape["fsdp"] > 1)
    groups: list[tuple[Node, ...]] = []
    bases = {node.base for node in nodes}
    # Of a node that does not run in every row only the rows that ran go through its model.
    plain = [node for node in nodes if not isinstance(features[node.name], Routed)]
    roles = [node for node in plain if node.weights_key in bases and _is_role(node, params)]
    for node in sorted(roles, key=lambda node: widths(features[node.name]).places):
        last = groups[-1] if groups else ()
        sizes = [widths(features[other.name]) for other in (*last, node)]
        if last and _alike(last[0], node) and pays(sizes, parts, gathers):
            groups[-1] = (*last, node)
        else:
            groups.append((node,))
    return (*groups, *((node,) for node in nodes if node not in roles))


def _is_role(node: Node, params: Params) -> bool:
    """Whether a node is a text of factors alone on weights that may be a base's."""
    if type(node.component) is not LanguageModel or node.plate is not None:
        return False
    own = by_path(params[node.params_key])
    # The base's own tree holds the weights too, with factors or without.
    factors = [path for path in own if is_lora(path)]
    alone = node.base is None or len(factors) == len(own)
    return alone and all(path.startswith("layers/") for path in factors)


def _alike(one: Node, other: Node) -> bool:
    models = one.component, other.component
    decoders = [model.decoder for model in models if isinstance(model, LanguageModel)]
    same = one.weights_key == other.weights_key and decoders[0] == decoders[1]
    return same and not one_at_a_time(decoders[0].config.remat)


def evaluate(
    system: CompoundSystem, nodes: Sequence[Node], params: Params, features: Mapping[str, Features], key: Keys
) -> Evaluated:
    """The log-probabilities and metrics of the nodes of one group.

    Args:
        system: Theirs.
        nodes: A group of `together`, or a part of one.
        params: `{params_key: tree}`.
        features: Of each node.
        key: One for all rows, or one a row.

    Returns:
        `{node: (log-probability, {metric: value})}`.
    """
    if len(nodes) == 1:
        [node] = nodes
        return {node.name: system.node_log_prob(node, node.tree(params), features[node.name], key)}
    models = [node.component for node in nodes if isinstance(node.component, LanguageModel)]
    tree = in_turns(params[nodes[0].weights_key], [params[node.params_key] for node in nodes])
    made = log_probs_together(models, tree, [features[node.name] for node in nodes], key)
    return {node.name: values for node, values in zip(nodes, made, strict=True)}
