"""The DPO step of large models on one device, in bfloat16 with random weights, beside what the device can do.

    python -m experiments.benchmarks.gpu [--cases llama-3.2-1b] [--repeats 5] [--folder runs/gpu_benchmark]
    python -m experiments.benchmarks.gpu --preset tiny      # the same code at toy sizes, on any machine

Measured are whole training steps (`make_train_step` with `DirectObjective`: both sides under policy and reference,
gradient, optimiser) of Llama-3.2-1B and the SDXL U-Net, all weights trained with master weights in float32, and of
Llama-3-8B with LoRA. Speed depends on shapes, not on values: no weights are downloaded.

The roofline is measured in the same run: a large bfloat16 matrix product (FLOP/s) and a large copy (bytes/s). A case's
MFU is its model FLOPs a second over the data sheet's peak (training/throughput.py has both); "of matmul" is
the same over the measured product. Times are of `steps` steps that follow each other without waiting, divided by their
number: the median of `repeats`, with the fastest and the slowest. Every case has a process of its own, so that its peak
memory is its own.
"""

import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.benchmarks.gpu_cases import CASES, Case
from experiments.common.command import made_by, parse_preset
from sysdpo_jax import DirectObjective, create_state, make_mesh, make_train_step
from sysdpo_jax.io import write_json
from sysdpo_jax.runs import keep_compilations
from sysdpo_jax.training import count_units, memory, peak_flops, step_flops

WARM_UP = 2


@dataclass(frozen=True)
class Config:
    """preset: "large" or "tiny" models; cases: by name; steps: in one timed repetition, of which there are `repeats`.

    matrix: rows of the square matrices of the roofline's product; precision: of both; copy_bytes: of its copy.
    """

    preset: str = "large"
    cases: tuple[str, ...] = tuple(CASES["large"])
    repeats: int = 5
    steps: int = 4
    matrix: int = 8192
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    copy_bytes: int = 2**30
    folder: Path = Path("runs/gpu_benchmark")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.cases) - CASES[self.preset].keys())
        if unknown:
            raise SystemExit(f"unknown case {unknown[0]!r}: choose among {', '.join(CASES[self.preset])}")


PRESETS = {
    "large": Config(),
    "tiny": Config(
        "tiny", tuple(CASES["tiny"]), repeats=2, steps=1, matrix=256, copy_bytes=2**20, folder=Path("runs/gpu_tiny")
    ),
}


def seconds_each(run: Callable[[], Any], repeats: int, steps: int) -> list[float]:
    """Seconds of one call of `run`, which returns what to wait for, in each repetition of `steps` calls."""
    for _ in range(WARM_UP):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        made = [run() for _ in range(steps)]
        jax.block_until_ready(made)
        times.append((time.perf_counter() - began) / steps)
    return times


def spread(times: list[float]) -> dict[str, Any]:
    """Median, fastest, slowest, and all of them."""
    return {"median": statistics.median(times), "fastest": min(times), "slowest": max(times), "all": times}


def roofline(config: Config) -> dict[str, Any]:
    """What the device reaches: "matmul_flops_per_second" and "copy_bytes_per_second", from the medians."""
    left, right = jax.random.normal(jax.random.key(0), (2, config.matrix, config.matrix), config.precision)
    product = jax.jit(jnp.matmul)
    matmul = spread(seconds_each(lambda: product(left, right), config.repeats, config.steps))
    source = jnp.zeros(config.copy_bytes // jnp.dtype(config.precision).itemsize, config.precision)
    copied = jax.jit(jnp.copy)
    copy = spread(seconds_each(lambda: copied(source), config.repeats, config.steps))
    return {
        "device": jax.devices()[0].device_kind,
        "matmul_flops_per_second": 2 * config.matrix**3 / matmul["median"],
        # Read once, written once.
        "copy_bytes_per_second": 2 * source.nbytes / copy["median"],
        "matmul_seconds": matmul,
        "copy_seconds": copy,
    }


def measure(case: Case, config: Config, mesh: Mesh | None = None) -> dict[str, Any]:
    """The figures of one case. Raises SystemExit when a step is not finite: nothing was timed then.

    mesh: by default one device.
    """
    keep_compilations(str(config.folder / "compiled"))
    system, optimizer, mesh = case.system, case.optimizer, make_mesh() if mesh is None else mesh
    state = create_state(system, case.params(jax.random.key(0)), optimizer, mesh)
    batch, key = case.batch(), jax.random.key(1)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    flops = sum(step_flops(system, state, batch).values())
    step = make_train_step(system, DirectObjective(beta=0.1), optimizer, mesh)
    losses = []

    def run() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch, key)
        losses.append(metrics["loss"])
        return metrics["loss"]

    began = time.perf_counter()
    jax.block_until_ready(run())
    first_step = time.perf_counter() - began
    times = spread(seconds_each(run, config.repeats, config.steps))
    if not all(bool(jnp.isfinite(loss)) for loss in losses):
        raise SystemExit(f"{case.name}: the loss is not finite; nothing was timed")
    peak = peak_flops(jax.devices()[0].device_kind)
    rate = flops / times["median"]
    units = count_units(system, batch)
    return {
        "trained": case.trained,
        "size": case.size,
        "parameters": sizes,
        "first_loss": float(losses[0]),
        "first_step_seconds": first_step,
        "seconds_per_step": times,
        **{name: number / times["median"] for name, number in units.items()},
        "model_flops_per_step": flops,
        "model_flops_per_second": rate,
        "mfu": None if peak is None else rate / peak,
        "peak_bytes": memory(jax.devices()[:1]).get("memory/peak_bytes"),
    }


def measure_by_name(preset: str, name: str, config: Config) -> dict[str, Any]:
    """`measure` of a case by its name: what a process of its own is told."""
    return measure(CASES[preset][name](), config)


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(results: dict[str, Any]) -> str:
    """The results as lines for people."""
    device = results["roofline"]
    matmul, copy = device["matmul_flops_per_second"], device["copy_bytes_per_second"]
    lines = [
        f"{device['device']}: matmul {matmul / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s",
        f"{'case':<18}{'trained':<9}{'size':<26}{'s/step':>9}{'spread':>18}{'per second':>22}{'MFU':>8}"
        f"{'of matmul':>11}{'peak GiB':>10}",
    ]
    for name, case in results["cases"].items():
        times = case["seconds_per_step"]
        unit, rate = next((k, v) for k, v in case.items() if k.endswith(f"_per_second/{name}"))
        mfu = "-" if case["mfu"] is None else f"{case['mfu']:.1%}"
        peak = "-" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 2**30:.1f}"
        lines.append(
            f"{name:<18}{case['trained']:<9}{case['size']:<26}{times['median']:>9.3f}"
            f"{times['fastest']:>10.3f}-{times['slowest']:.3f}{rate:>15.1f} {unit.split('_')[0]:<6}{mfu:>8}"
            f"{case['model_flops_per_second'] / matmul:>10.1%}{peak:>10}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure the roofline and each case, write results.json after each and print the table."""
    config = parse_preset(PRESETS, arguments, __doc__)
    # The parent holds no device memory; a child may have nearly all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    results: dict[str, Any] = {
        "roofline": apart(roofline, config),
        "cases": {},
        "settings": dataclasses.asdict(config) | {"folder": str(config.folder)},
        "made_by": made_by("experiments.benchmarks.gpu", arguments, ("python", "jax", "jaxlib", "flax")),
    }
    for name in config.cases:
        results["cases"][name] = apart(measure_by_name, config.preset, name, config)
        write_json(config.folder / "results.json", results)
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
