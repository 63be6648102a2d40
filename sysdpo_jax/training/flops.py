"""Floating-point operations counted from shapes, before anything runs.

A compiler's own count has a scanned layer once; here a body counts as often as it runs. A product of matrices counts 2
for each multiplication and addition of a pair, what lies outside the matrix (masked scores, padding) included; what is
done element by element counts nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import PyTree

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.models.lora import is_lora, strip_lora
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Features, Params

# They contain products that a jaxpr does not show.
CUDNN = ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper")
OPAQUE = frozenset({"pallas_call", "ragged_dot_general", *CUDNN})


class FlopsError(ValueError):
    """A program whose operations cannot be counted: the message names the primitive and the remedy."""


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the operations of a call in matrix products and convolutions; nothing is computed.

    A scan counts length times, of a `cond` the dearest branch, recomputation as often as it is asked for.

    Args:
        function: Jittable.
        arguments: Arrays, or anything with shape and dtype.

    Returns:
        Those on all devices together.

    Raises:
        FlopsError: For a product in a `while` loop, which runs nobody knows how often, and for kernels whose products
            cannot be seen.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*jax.tree.map(_shape, arguments)).jaxpr)


def forward_flops(system: CompoundSystem, params: Params, features: Mapping[str, Features]) -> dict[str, int]:
    """`{node: operations}` of one evaluation of every node's log-probability on prepared features.

    Those of the model, not of the means: with plain attention, every score counted, and nothing recomputed.
    params: arrays or shapes, `{params_key: tree}`; features: of the nodes to count.
    """
    key = jax.random.key(0)
    counted = {}
    for node in system.nodes:
        if node.name in features and not node.deterministic:
            plain = replace(node, component=plain_attention(node.component))
            one = lambda tree, values, node=plain: system.node_log_prob(node, tree, values, key)[0]  # noqa: E731
            counted[node.name] = count_flops(one, params[node.params_key], features[node.name])
    return counted


def step_flops(system: CompoundSystem, state: TrainState, batch: PyTree) -> dict[str, int]:
    """Count the operations that one step needs of each node's model.

    In units of a forward pass, on both sides of every pair: 3 for a trained model, whose backward pass takes two
    products for each one of the forward pass (the gradients of its input and of its weights); 2 and the thin products
    once more where LoRA factors alone are trained, as the gradients of the other weights are not formed; and 1 for the
    reference unless the batch brings its values. A frozen model has 0, and in a `SampledBatch`, where it weighs the
    intermediates, 1. Recomputation and the optimiser are not counted. Where `trainable` picks out some of the weights
    themselves it is an upper bound; with LoRA it is a few percent too low, because the products of attention, whose
    backward pass takes two of them in any case, are counted as all others.

    Args:
        system: The graph.
        state: Arrays or shapes.
        batch: A `PairBatch` or `SampledBatch` of arrays or shapes.

    Returns:
        `{node: operations}`.

    Raises:
        TypeError: For another batch.
    """
    match batch:
        case PairBatch():
            evaluated, both, given = dict(batch.chosen), set(batch.chosen), set(batch.reference or {})
        case SampledBatch():
            sides = {**batch.intermediates, **batch.outputs.chosen}
            evaluated, both, given = jax.tree.map(_folded, sides), set(batch.outputs.chosen), set()
        case _:
            raise TypeError(f"step_flops counts a PairBatch or a SampledBatch, not a {type(batch).__name__}")
    forward = forward_flops(system, state.params, evaluated)
    return {
        name: (2 if name in both else 1)
        * _of_step(system, system.node(name), state, evaluated, forward[name], name in given, batch)
        for name in forward
    }


def _of_step(
    system: CompoundSystem,
    node: Node,
    state: TrainState,
    features: Mapping[str, Features],
    forward: int,
    given: bool,
    batch: PyTree,
) -> int:
    key = node.params_key
    if key not in state.reference:
        return forward if isinstance(batch, SampledBatch) else 0
    reference = 0 if given else forward
    if not all(is_lora(path) for path in by_path(state.trained[key])):
        return 3 * forward + reference
    base = {**state.params, key: strip_lora(state.params[key])}
    thin = forward - forward_flops(system, base, {node.name: features[node.name]})[node.name]
    return 2 * forward + thin + reference


def plain_attention(value: Any) -> Any:
    """Replace fused attention, which hides its products, by that of the mathematics.

    Args:
        value: A component, a module or a configuration.

    Returns:
        It with plain attention wherever its configurations say how.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for field in fields(value):
        if field.init and field.name != "parent":
            old = getattr(value, field.name)
            new = "plain" if field.name == "attention" and isinstance(old, str) else plain_attention(old)
            if new is not old:
                changes[field.name] = new
    return replace(value, **changes) if changes else value


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in OPAQUE:
        raise FlopsError(
            f"the products of the primitive {name!r} cannot be counted: count with attention='plain' (plain_attention)"
        )
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape_of(equation.invars[0])
        return 2 * _size(equation) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = _shape_of(equation.invars[1])
        # Each element of the result is a sum over the window and the input channels of its group.
        return 2 * _size(equation) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise FlopsError("a `while` loop contains products: how often it runs is not known; use a scan of fixed length")
    if name == "shard_map":
        # The body is one device's share.
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def _size(equation: JaxprEqn) -> int:
    return math.prod(_shape_of(equation.outvars[0]))


def _shape_of(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an equation contains: a loop's body, the branches of a `cond`, a function that is called."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a placement: devices that are not there would not be found.
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _folded(leaf: Any) -> jax.ShapeDtypeStruct:
    """[batch, M, ...] as [batch * M, ...]: every intermediate is a row to the model."""
    rows, intermediates, *rest = leaf.shape
    return jax.ShapeDtypeStruct((rows * intermediates, *rest), leaf.dtype)
