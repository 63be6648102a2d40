"""How fast a run trains: steps, pairs, tokens and images a second, the share of the devices' peak, and memory.

All of it is host arithmetic on the batches as they were prepared; no figure waits for a device.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from sysdpo_jax.batch import PairBatch, SampledBatch
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.training.flops import FlopsError, step_flops
from sysdpo_jax.training.sharding import batch_shard
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


class Meter(NamedTuple):
    """What has been counted and not read yet.

    flops: model FLOPs of one step of this process's rows, {node: FLOPs}; None where the devices' peak is unknown.
    waiting: (step, {figure: number}) of the steps not read yet; last: (step, seconds) of the last reading.
    """

    flops: Mapping[str, int] | None
    waiting: tuple[tuple[int, Mapping[str, int]], ...] = ()
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

    def start(self, state: TrainState, batch: PyTree) -> Meter:
        """The meter before the first step, whose batch (this process's rows, not placed) has the shapes of all.

        The batch's FLOPs are counted from shapes, where the peak is known and the batch is one of pairs. Warns where a
        component's cannot be counted.
        """
        if peak_flops(self._kind) is None or not isinstance(batch, PairBatch | SampledBatch):
            return Meter(None)
        try:
            return Meter(step_flops(self.system, state, batch))
        except FlopsError as error:
            warnings.warn(f"the metrics will have no throughput/mfu: {error}", stacklevel=2)
            return Meter(None)

    def count(self, meter: Meter, step: int, batch: PyTree) -> Meter:
        """The meter with a step's batch (this process's rows, not placed)."""
        return meter._replace(waiting=(*meter.waiting, (step, count_units(self.system, batch))))

    def read(self, meter: Meter, step: int, now: float) -> tuple[Meter, dict[str, float]]:
        """The figures of the steps after the last reading up to `step`, whose metrics the caller has just read.

        now: seconds of a monotonic clock. "throughput/steps_per_second", "throughput/pairs_per_second",
        "throughput/<unit>_per_second/<node>" with the units of `Component.units`, "throughput/mfu" (model FLOPs, see
        training/flops.py, over `PEAK_FLOPS` of all devices) and each node's part of it "throughput/mfu/<node>", and
        those of `memory`. No mfu on devices of unknown peak. The first reading gives memory alone, because the time
        before it contains the compilation.
        """
        done = [counts for at, counts in meter.waiting if at <= step]
        after = Meter(meter.flops, tuple(pair for pair in meter.waiting if pair[0] > step), (step, now))
        if meter.last is None or not done:
            return after, memory(self.mesh.local_devices)
        seconds, shards = now - meter.last[1], batch_shard(self.mesh)[1]
        totals = {name: shards * sum(counts[name] for counts in done) for name in done[0]}
        figures = {"throughput/steps_per_second": len(done) / seconds}
        figures |= {f"throughput/{name}": number / seconds for name, number in totals.items()}
        if meter.flops is not None:
            figures |= self._mfu(meter.flops, shards * len(done) / seconds)
        return after, figures | memory(self.mesh.local_devices)

    @property
    def _kind(self) -> str:
        return self.mesh.devices.flat[0].device_kind

    def _mfu(self, flops: Mapping[str, int], rate: float) -> dict[str, float]:
        peak = PEAK_FLOPS[self._kind] * self.mesh.size
        parts = {f"throughput/mfu/{node}": number * rate / peak for node, number in flops.items()}
        return {"throughput/mfu": sum(parts.values()), **parts}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of that kind; None for a kind that is not in `PEAK_FLOPS`."""
    return PEAK_FLOPS.get(device_kind)


def count_units(system: CompoundSystem, batch: PyTree) -> dict[str, int]:
    """{"pairs_per_second": pairs of a prepared batch, "<unit>_per_second/<node>": the node's units on both sides}.

    Intermediates that were searched for are the same on both sides and evaluated once: they count once. A batch that is
    neither a `PairBatch` nor a `SampledBatch` has no units.
    """
    match batch:
        case PairBatch():
            features = [batch.chosen, batch.rejected]
        case SampledBatch():
            features = [batch.intermediates, batch.outputs.chosen, batch.outputs.rejected]
        case _:
            return {}
    totals = {"pairs_per_second": _rows(features)}
    for nodes in features:
        for name, values in nodes.items():
            for unit, number in system.node(name).component.units(values).items():
                figure = f"{unit}_per_second/{name}"
                totals[figure] = totals.get(figure, 0) + number
    return totals


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """{"memory/peak_bytes", "memory/bytes_in_use"} of the fullest of these devices; {} where they do not say (CPU)."""
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
