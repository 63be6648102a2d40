"""How fast a run trains: steps, pairs, tokens and images a second, the share of the devices' peak, and memory.

All of it is host arithmetic on the batches as they were prepared; no figure waits for a device.

Floating-point operations are counted from shapes, before anything runs. A compiler's own count has a scanned layer
once; here a body counts as often as it runs. A product of matrices counts 2 for each multiplication and addition of a
pair, what lies outside the matrix (masked scores, padding) included; what is done element by element counts nothing.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh
from jaxtyping import PyTree

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.components.routed import Routed, only_runs
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.models.lora import is_lora, strip_lora
from sysdpo_jax.models.remat import KERNELS
from sysdpo_jax.parallel.sharding import batch_shard
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Features, Params

# Dense bfloat16 FLOP/s of one device, by the name that JAX gives it. NVIDIA's data sheets state twice as much for H100
# and H200 (1979 TFLOP/s), "with sparsity". A TPU device is a chip.
PEAK_FLOPS = {
    # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM) and https://www.nvidia.com/en-us/data-center/h200/ (SXM)
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
    # https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

# They contain products that a jaxpr does not show.
OPAQUE = frozenset({*KERNELS, "dot_product_attention_bwd_wrapper", "ragged_dot_general"})


class Counted(NamedTuple):
    """What a step did, of this process's rows: {figure: number} of what is told by the second; {node: padding}."""

    step: int
    amounts: Mapping[str, float]
    padding: Mapping[str, float]


@dataclass
class Throughput:
    """Counts what a run does between two rows of metrics.

    Speeds are of all devices together, over all the time between two rows: making batches, saving and evaluating
    included. Both sides of a pair count. Of several processes each counts its own rows and takes the others' to be like
    them.

    mesh: that of the step. flops: {shapes of a batch: model FLOPs by node}; those of a batch whose FLOPs nobody knows
    are empty. waiting: what has been counted and not read yet. last: seconds of the last reading.
    """

    system: CompoundSystem
    mesh: Mesh
    flops: dict[Hashable, Mapping[str, int]] = field(default_factory=dict)
    waiting: list[Counted] = field(default_factory=list)
    last: float | None = None

    def count(self, step: int, state: TrainState, batch: PyTree) -> None:
        """Add a step's batch (this process's rows, not placed).

        FLOPs are counted from shapes, once for each of them, where the devices' peak is known and the batch is one of
        pairs. Warns where a component's cannot be counted.
        """
        features, peak = _features(batch), peak_flops(self.mesh.devices.flat[0].device_kind)
        amounts: dict[str, float] = {**count_units(self.system, batch)}
        if peak is not None and features:
            parts = {name: flops / (peak * self.mesh.size) for name, flops in self._flops_of(state, batch).items()}
            if parts:
                amounts |= {"mfu": sum(parts.values()), **{f"mfu/{name}": part for name, part in parts.items()}}
        self.waiting.append(Counted(step, amounts, padding(self.system, features)))

    def read(self, step: int, now: float) -> dict[str, float]:
        """The figures of the steps after the last reading up to `step`, whose metrics the caller has just read.

        now: seconds of a monotonic clock. "throughput/steps_per_second", "throughput/pairs_per_second",
        "throughput/<unit>_per_second/<node>" with the units of `Component.units`, "throughput/mfu" (model FLOPs, see
        `step_flops`, over `PEAK_FLOPS` of all devices) and each node's part of it "throughput/mfu/<node>", those
        of `memory`, and "padding/<node>", the share of places that hold nothing. No mfu on devices of unknown peak. The
        first reading gives no speed, because the time before it contains the compilation.
        """
        done = [counted for counted in self.waiting if counted.step <= step]
        self.waiting = [counted for counted in self.waiting if counted.step > step]
        last, self.last = self.last, now
        figures = memory(self.mesh.local_devices)
        if not done:
            return figures
        known = [name for name in done[0].padding if all(name in counted.padding for counted in done)]
        figures |= {f"padding/{name}": sum(counted.padding[name] for counted in done) / len(done) for name in known}
        if last is None:
            return figures
        figures["throughput/steps_per_second"] = len(done) / (now - last)
        rate = batch_shard(self.mesh)[1] / (now - last)
        # A figure that one of the steps lacks, as mfu, would be too low.
        names = [name for name in done[0].amounts if all(name in counted.amounts for counted in done)]
        return figures | {f"throughput/{name}": rate * sum(c.amounts[name] for c in done) for name in names}

    def _flops_of(self, state: TrainState, batch: PyTree) -> Mapping[str, int]:
        # The structure says how many runs there is room for.
        shapes = jax.tree.structure(batch), *((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        if shapes not in self.flops:
            self.flops[shapes] = {}
            try:
                self.flops[shapes] = step_flops(self.system, state, batch)
            except FlopsError as error:
                warnings.warn(f"the metrics will have no throughput/mfu: {error}", stacklevel=2)
        return self.flops[shapes]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device.

    Args:
        device_kind: As JAX calls it.

    Returns:
        The peak; None for a kind that is not in `PEAK_FLOPS`.
    """
    return PEAK_FLOPS.get(device_kind)


def count_units(system: CompoundSystem, batch: PyTree) -> dict[str, int]:
    """What speed is counted in.

    Intermediates that were searched for are the same on both sides and evaluated once: they count once.

    Args:
        system: The graph.
        batch: Prepared; one that is neither a `PairBatch` nor a `SampledBatch` has no units.

    Returns:
        {"pairs_per_second": pairs of the batch, "<unit>_per_second/<node>": the node's units on both sides}.
    """
    features = _features(batch)
    if not features:
        return {}
    totals = Counter({"pairs_per_second": int(jax.tree.leaves(batch)[0].shape[0])})
    for name, values in features:
        for unit, number in system.node(name).component.units(only_runs(values)).items():
            totals[f"{unit}_per_second/{name}"] += number
    return dict(totals)


def padding(system: CompoundSystem, features: Sequence[tuple[str, Features]]) -> dict[str, float]:
    """{node: share of its features' places that hold nothing}, of nodes whose rows differ in size."""
    shares: dict[str, list[float]] = {}
    for name, values in features:
        component, runs = system.node(name).component, only_runs(values)
        if component.sizes(runs):
            shares.setdefault(name, []).append(component.padding(runs))
    return {name: sum(own) / len(own) for name, own in shares.items()}


def _features(batch: PyTree) -> list[tuple[str, Features]]:
    """(node, features) of both sides, and of intermediates, which are the same on both; of other batches none."""
    match batch:
        case PairBatch():
            sides = [*batch.chosen.items(), *batch.rejected.items()]
            return [(name, own) for name, own in sides if not (isinstance(own, Routed) and own.features is None)]
        case SampledBatch():
            return [*batch.intermediates.items(), *_features(batch.outputs)]
    return []


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Memory of the fullest device.

    Args:
        devices: Some of this process's.

    Returns:
        {"memory/peak_bytes", "memory/bytes_in_use"}; {} where they do not say (CPU).
    """
    known = [stat for device in devices if (stat := device.memory_stats())]
    names = {"memory/peak_bytes": "peak_bytes_in_use", "memory/bytes_in_use": "bytes_in_use"}
    return {name: float(max(stat[own] for stat in known)) for name, own in names.items()} if known else {}


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
    # Without a placement: devices that are not there would not be found.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return _of_jaxpr(jax.make_jaxpr(function)(*shapes).jaxpr)


def forward_flops(system: CompoundSystem, params: Params, features: Mapping[str, Features]) -> dict[str, int]:
    """`{node: operations}` of one evaluation of every node's log-probability on prepared features.

    Those of the model, not of the means: with plain attention, every score counted, and nothing recomputed.
    params: arrays or shapes, `{params_key: tree}`; features: of the nodes to count.
    """
    key = jax.random.key(0)
    counted = {}
    for node in system.nodes:
        if node.name in features and node.has_params:
            plain = replace(node, component=plain_attention(node.component))
            one = lambda tree, values, node=plain: system.node_log_prob(node, tree, values, key)[0]  # noqa: E731
            counted[node.name] = count_flops(one, node.tree(params), features[node.name])
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
            evaluated = {name: _of_one_side(own) for name, own in batch.chosen.items()}
            both, given = set(batch.chosen), set(batch.reference or {})
        case SampledBatch():
            sides = {**batch.intermediates, **batch.outputs.chosen}
            evaluated, both, given = jax.tree.map(_folded, sides), set(batch.outputs.chosen), set()
        case _:
            raise TypeError(f"step_flops counts a PairBatch or a SampledBatch, not a {type(batch).__name__}")
    forward = forward_flops(system, state.params, evaluated)

    def of_side(name: str) -> int:
        key, one = system.node(name).params_key, forward[name]
        if key not in state.reference:
            return one if isinstance(batch, SampledBatch) else 0
        reference = 0 if name in given else one
        if not all(is_lora(path) for path in by_path(state.trained[key])):
            return 3 * one + reference
        base = {**state.params, key: strip_lora(state.params[key])}
        thin = one - forward_flops(system, base, {name: evaluated[name]})[name]
        return 2 * one + thin + reference

    return {name: (2 if name in both else 1) * of_side(name) for name in forward}


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
    for name in (each.name for each in fields(value) if each.init and each.name != "parent"):
        old = getattr(value, name)
        new = "plain" if name == "attention" and isinstance(old, str) else plain_attention(old)
        if new is not old:
            changes[name] = new
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
        return 2 * math.prod(_shape_of(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = _shape_of(equation.invars[1])
        # Each element of the result is a sum over the window and the input channels of its group.
        window = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_shape_of(equation.outvars[0])) * window
    # A loop's body, the branches of a `cond`, a function that is called.
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(params)]
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


def _shape_of(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _of_one_side(features: Features) -> Features:
    """With the room that one side takes of what both have."""
    known = isinstance(features, Routed) and features.room is not None
    return replace(features, room=-(-features.room // 2)) if known else features


def _folded(leaf: Any) -> jax.ShapeDtypeStruct:
    """[batch, M, ...] as [batch * M, ...]: every intermediate is a row to the model."""
    rows, intermediates, *rest = leaf.shape
    return jax.ShapeDtypeStruct((rows * intermediates, *rest), leaf.dtype)
