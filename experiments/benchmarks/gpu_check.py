"""Is the library right on this machine's GPU? Kernels against their formula, a step of every family, the experiments.

    make gpu-check                                            # in an environment of its own, with JAX for CUDA
    python -m experiments.benchmarks.gpu_check [--checks attention steps] [--folder runs/gpu_check]
    python -m experiments.benchmarks.gpu_check --preset tiny  # the same code at toy sizes; without a GPU it ends with 1

Prints a table, writes <folder>/results.json and ends with 1 where a row failed; without a GPU the first row fails.

attention: the attention of every family, forward and backward, in bfloat16 as "auto" chooses it, against "plain" in
float32. The largest error, divided by the largest entry, may be 2%: bfloat16 rounds to 0.4% (8 bits), and scores,
weights, results and gradients are each rounded. steps: two training steps of a tiny model of every family in bfloat16:
the first loss is ln 2, for policy and reference are one model (to 0.01: the compiler may round them differently), the
second is finite, and something moved. demo: the smoke preset of the main experiment. benchmark: the tiny preset of
experiments.benchmarks.gpu.
"""

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu_cases import ATTENTION, STEPS, AttentionShape, Case
from experiments.common.command import made_by, parse_preset
from sysdpo_jax import DirectObjective, create_state, make_mesh, make_train_step
from sysdpo_jax.io import write_json
from sysdpo_jax.models import AttentionRequest, attend, choose
from sysdpo_jax.runs import keep_compilations

TOLERANCE, LOSS_TOLERANCE = 0.02, 0.01
COMMANDS = {
    "demo": ("experiments.progressive_images", "--preset", "smoke"),
    "benchmark": ("experiments.benchmarks.gpu", "--preset", "tiny"),
}
# A command that takes longer hangs.
MINUTES = 30
CHECKS = ("attention", "steps", *COMMANDS)


@dataclass(frozen=True)
class Config:
    """preset: "full" or "tiny"; checks: which; longest: of an attention's lengths, which cuts longer ones."""

    preset: str = "full"
    checks: tuple[str, ...] = CHECKS
    longest: int = 8192
    folder: Path = Path("runs/gpu_check")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.checks) - set(CHECKS))
        if unknown:
            raise SystemExit(f"unknown check {unknown[0]!r}: choose among {', '.join(CHECKS)}")


PRESETS = {
    "full": Config(),
    "tiny": Config("tiny", ("attention", "steps"), longest=48, folder=Path("runs/gpu_check_tiny")),
}


class CheckError(Exception):
    """A check found what is not right."""


@dataclass(frozen=True)
class Row:
    """One line of the table. said: what was found; of a failure, what is wrong."""

    check: str
    name: str
    passed: bool
    said: str
    seconds: float


def check_device() -> str:
    """Raises `CheckError` where JAX sees no GPU."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "gpu":
        raise CheckError(f"JAX sees no GPU, but {kind}: pip install '.[cuda]' on a machine that has one")
    return kind


def check_attention(shape: AttentionShape) -> str:
    """The kernel and the largest relative error of the output and the three gradients."""
    sizes = {"queries": (2, shape.length, shape.heads, shape.width)}
    sizes |= dict.fromkeys(("keys", "values"), (2, shape.slots, shape.groups, shape.width))
    keys = jax.random.split(jax.random.key(0), 4)
    queries, slots, values = (
        jax.random.normal(k, size, jnp.bfloat16) for k, size in zip(keys[:3], sizes.values(), strict=True)
    )
    onto = jax.random.normal(keys[3], sizes["queries"], jnp.bfloat16)
    run = partial(attend, softcap=shape.softcap, causal=shape.causal, window=shape.window)

    @partial(jax.jit, static_argnums=0)
    def both(implementation: str, onto: jax.Array, *args: jax.Array) -> list[jax.Array]:
        out, back = jax.vjp(partial(run, implementation=implementation), *args)
        return [out, *back(onto)]

    restricted = False, shape.softcap is not None, shape.causal, shape.window
    request = AttentionRequest.of(queries, slots, values, *restricted)
    kernel = choose("auto", jax.default_backend(), request)
    found = both("auto", onto, queries, slots, values)
    with jax.default_matmul_precision("highest"):
        wanted = both("plain", *(x.astype(jnp.float32) for x in (onto, queries, slots, values)))
    errors = [
        float(jnp.abs(got.astype(jnp.float32) - right).max() / jnp.abs(right).max())
        for got, right in zip(found, wanted, strict=True)
    ]
    said = f"{kernel}, largest error {max(errors):.2%}"
    if not max(errors) <= TOLERANCE:
        parts = ", ".join(f"{n} {e:.2%}" for n, e in zip(("output", *sizes), errors, strict=True))
        raise CheckError(f"{said} of at most {TOLERANCE:.0%} ({parts})")
    return said


def check_steps(make: Callable[[], Case]) -> str:
    """The losses of two training steps."""
    case = make()
    mesh, optimizer = make_mesh(), case.optimizer
    state = create_state(case.system, case.params(jax.random.key(0)), optimizer, mesh)
    before = [jnp.copy(leaf) for leaf in jax.tree.leaves(state.params)]
    step = make_train_step(case.system, DirectObjective(beta=0.1), optimizer, mesh)
    losses = []
    for number in range(2):
        state, metrics = step(state, case.batch(), jax.random.key(number))
        losses.append(float(metrics["loss"]))
    said = f"losses {losses[0]:.4f}, {losses[1]:.4f}"
    if not abs(losses[0] - math.log(2)) <= LOSS_TOLERANCE:
        raise CheckError(f"{said}: the first is not ln 2")
    if not math.isfinite(losses[1]):
        raise CheckError(f"{said}: the second is not finite")
    if all(bool((old == new).all()) for old, new in zip(before, jax.tree.leaves(state.params), strict=True)):
        raise CheckError(f"{said}: no parameter moved")
    return said


def check_command(name: str, folder: Path) -> str:
    """The last line that one of `COMMANDS` prints."""
    command = [sys.executable, "-m", *COMMANDS[name], "--folder", str(folder / name)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES * 60)
    except subprocess.TimeoutExpired:
        raise CheckError(f"not done after {MINUTES} minutes") from None
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or ["it printed nothing"]
    if run.returncode:
        raise CheckError(f"exit code {run.returncode}: {lines[-1]}")
    return lines[-1].strip()


def rows(config: Config) -> Iterator[Row]:
    """All that are asked for, one after another; what a check raises is its failure."""
    checks: list[tuple[str, str, Callable[[], str]]] = [("device", "a GPU", check_device)]
    if "attention" in config.checks:
        checks += [
            ("attention", name, partial(check_attention, shape.cut(config.longest)))
            for name, shape in ATTENTION.items()
        ]
    if "steps" in config.checks:
        checks += [("step", name, partial(check_steps, make)) for name, make in STEPS.items()]
    checks += [
        ("command", name, partial(check_command, name, config.folder)) for name in COMMANDS if name in config.checks
    ]
    for check, name, run in checks:
        began = time.monotonic()
        try:
            passed, said = True, run()
        except CheckError as error:
            passed, said = False, str(error)
        except Exception as error:  # A kernel may fail in any way; the others are still wanted.
            passed, said = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Row(check, name, passed, said, round(time.monotonic() - began, 1))


def main(arguments: list[str]) -> None:
    """Check, print the table row by row, write results.json, and end with 1 where a row failed."""
    config = parse_preset(PRESETS, arguments, __doc__)
    # The commands need the GPU's memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_compilations(str(config.folder / "compiled"))
    made = []
    for row in rows(config):
        made.append(row)
        print(
            f"{'pass' if row.passed else 'FAIL'}  {row.check:<10}{row.name:<24}{row.seconds:>7.1f} s  {row.said}",
            flush=True,
        )
    failed = [row for row in made if not row.passed]
    results = {
        "device": jax.devices()[0].device_kind,
        "passed": len(made) - len(failed),
        "failed": len(failed),
        "rows": [dataclasses.asdict(row) for row in made],
        "made_by": made_by("experiments.benchmarks.gpu_check", arguments, ("python", "jax", "jaxlib")),
    }
    write_json(config.folder / "results.json", results)
    where = "" if made[0].passed else "no GPU, so that nothing was checked on one: "
    print(f"{where}{len(made) - len(failed)} passed, {len(failed)} failed: {config.folder / 'results.json'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
