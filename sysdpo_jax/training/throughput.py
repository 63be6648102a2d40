"""How fast a run trains: steps, pairs, tokens and images a second, the share of the devices' peak, and memory.

All of it is host arithmetic on the batches as they were prepared; no figure waits for a device.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.parallel.sharding import batch_shard
from sysdpo_jax.training.flops import FlopsError, step_flops
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.typing import Features

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


class Counted(NamedTuple):
    """What a step did, of this process's rows: {figure: number}, {node: share of padding}, {node: model FLOPs}."""

    step: int
    units: Mapping[str, int]
    padding: Mapping[str, float]
    flops: Mapping[str, int]


class Meter(NamedTuple):
    """What has been counted and not read yet: the steps, and (step, seconds) of the last reading.

    flops: {shapes of a batch: model FLOPs by node}; those of a batch whose FLOPs nobody knows are empty.
    """

    flops: Mapping[Hashable, Mapping[str, int]] = {}
    waiting: tuple[Counted, ...] = ()
    last: tuple[int, float] | None = None


@dataclass(frozen=True)
class Throughput:
    """Counts what a run does between two rows of metrics. mesh: that of the step.

    Speeds are of all devices together, over all the time between two rows: making batches, saving and evaluating
    included. Both sides of a pair count. Of several processes each counts its own rows and takes the others' to be like
    them.
    """

    system: CompoundSystem
    mesh: Mesh

    def count(self, meter: Meter, step: int, state: TrainState, batch: PyTree) -> Meter:
        """The meter with a step's batch (this process's rows, not placed).

        FLOPs are counted from shapes, once for each of them, where the devices' peak is known and the batch is one of
        pairs. Warns where a component's cannot be counted.
        """
        sides = _sides(batch)
        if peak_flops(self._kind) is not None and sides:
            shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
            if shapes not in meter.flops:
                meter = meter._replace(flops={**meter.flops, shapes: self._flops(state, batch)})
            flops = meter.flops[shapes]
        else:
            flops = {}
        counted = Counted(step, count_units(self.system, batch), padding(self.system, sides), flops)
        return meter._replace(waiting=(*meter.waiting, counted))

    def read(self, meter: Meter, step: int, now: float) -> tuple[Meter, dict[str, float]]:
        """The figures of the steps after the last reading up to `step`, whose metrics the caller has just read.

        now: seconds of a monotonic clock. "throughput/steps_per_second", "throughput/pairs_per_second",
        "throughput/<unit>_per_second/<node>" with the units of `Component.units`, "throughput/mfu" (model FLOPs, see
        training/flops.py, over `PEAK_FLOPS` of all devices) and each node's part of it "throughput/mfu/<node>", those
        of `memory`, and "padding/<node>", the share of places that hold nothing. No mfu on devices of unknown peak. The
        first reading gives no speed, because the time before it contains the compilation.
        """
        done = [counted for counted in meter.waiting if counted.step <= step]
        after = Meter(meter.flops, tuple(c for c in meter.waiting if c.step > step), (step, now))
        figures = memory(self.mesh.local_devices)
        if not done:
            return after, figures
        figures |= {f"padding/{name}": sum(c.padding[name] for c in done) / len(done) for name in done[0].padding}
        if meter.last is None:
            return after, figures
        rate = batch_shard(self.mesh)[1] / (now - meter.last[1])
        figures["throughput/steps_per_second"] = len(done) / (now - meter.last[1])
        figures |= {f"throughput/{name}": rate * sum(c.units[name] for c in done) for name in done[0].units}
        if all(counted.flops for counted in done):
            figures |= self._mfu({name: rate * sum(c.flops[name] for c in done) for name in done[0].flops})
        return after, figures

    def _flops(self, state: TrainState, batch: PyTree) -> Mapping[str, int]:
        try:
            return step_flops(self.system, state, batch)
        except FlopsError as error:
            warnings.warn(f"the metrics will have no throughput/mfu: {error}", stacklevel=2)
            return {}

    @property
    def _kind(self) -> str:
        return self.mesh.devices.flat[0].device_kind

    def _mfu(self, rates: Mapping[str, float]) -> dict[str, float]:
        """rates: FLOPs a second of each node."""
        peak = PEAK_FLOPS[self._kind] * self.mesh.size
        parts = {f"throughput/mfu/{node}": rate / peak for node, rate in rates.items()}
        return {"throughput/mfu": sum(parts.values()), **parts}


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
    features = _sides(batch)
    if not features:
        return {}
    totals = {"pairs_per_second": _rows(features)}
    for nodes in features:
        for name, values in nodes.items():
            for unit, number in system.node(name).component.units(values).items():
                figure = f"{unit}_per_second/{name}"
                totals[figure] = totals.get(figure, 0) + number
    return totals


def padding(system: CompoundSystem, sides: Sequence[Features]) -> dict[str, float]:
    """{node: share of its features' places that hold nothing}, of nodes whose rows differ in size; of some features."""
    shares: dict[str, list[float]] = {}
    for nodes in sides:
        for name, values in nodes.items():
            component = system.node(name).component
            if component.sizes(values):
                shares.setdefault(name, []).append(component.padding(values))
    return {name: sum(own) / len(own) for name, own in shares.items()}


def _sides(batch: PyTree) -> list[Features]:
    """The features of both sides, and of intermediates, which are the same on both; of other batches none."""
    match batch:
        case PairBatch():
            return [batch.chosen, batch.rejected]
        case SampledBatch():
            return [batch.intermediates, batch.outputs.chosen, batch.outputs.rejected]
    return []


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Memory of the fullest device.

    Args:
        devices: Some of this process's.

    Returns:
        {"memory/peak_bytes", "memory/bytes_in_use"}; {} where they do not say (CPU).
    """
    stats = [device.memory_stats() for device in devices]
    known = [stat for stat in stats if stat]
    if not known:
        return {}
    return {
        "memory/peak_bytes": float(max(stat["peak_bytes_in_use"] for stat in known)),
        "memory/bytes_in_use": float(max(stat["bytes_in_use"] for stat in known)),
    }


def _rows(features: list[Features]) -> int:
    return int(jax.tree.leaves(features)[0].shape[0])
