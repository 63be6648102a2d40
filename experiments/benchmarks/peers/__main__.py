"""Our training steps and our decoding beside those of TRL, diffusers, transformers and vLLM, in one run.

    make benchmark-peers                                     # the peers in an environment of their own; on a CPU
    make benchmark-peers PRESET=gpu                          # on one NVIDIA GPU
    python -m experiments.benchmarks.peers [--preset gpu] [--cases dpo-equal decode] [--peer-python PATH]

Cases are those of `experiments/benchmarks/peers/cases.py`. Each side has a process of its own, one after the other, in
turn in each of `rounds` rounds, so that memory is its own and noise hits all alike. Sides must do the same work: as
many parameters, the same tokens, a first loss of ln 2. In float32 peers of a decoder load our weights, and the norm of
the first step's gradient, or the first new tokens, must be ours; of a U-Net it is the norm of its output where all
weights are one number. A side that did other work, is not installed, fails or is not done after `limit` seconds is in
the table with its reason and has no ratio.

Figures: seconds of a step, the median, or the mean of an epoch of unequal lengths; tokens of both sides, images or new
tokens a second; the peer's time over ours; MFU, the plain model's FLOPs (each row by itself: nothing shared, padded or
recomputed) over the peak of the data sheet; the same over the matrix product that is measured in the run, or, for
decoding on a GPU, the bytes that must be read over the measured copy; peak memory of the GPU or, on a CPU, of the
process; and seconds to the end of the first step, with compilation.

Prints the table and writes <folder>/results.json, in which a run replaces the cases that it measured; ends with 1 where
our side failed or a side did other work.
"""

import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks import gpu
from experiments.benchmarks.peers import ours
from experiments.benchmarks.peers.cases import CASES, OURS, SIDES, Case
from experiments.benchmarks.peers.processes import Outcome, ask
from experiments.benchmarks.peers.summary import failures, summarise, table
from experiments.benchmarks.peers.work import Device, as_json
from experiments.common.command import made_by, parse_preset
from sysdpo_jax.io import read_json, write_json
from sysdpo_jax.training import peak_flops

MODULE = "experiments.benchmarks.peers"
ROOFLINES = {
    "cpu": gpu.Config(repeats=3, steps=2, matrix=2048, precision="float32", copy_bytes=2**28),
    "gpu": gpu.Config(),
    "tiny": gpu.PRESETS["tiny"],
}
# Of the children: which devices they see, and how much of them. vLLM on a CPU would take 4 GiB for its cache.
ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"},
    "gpu": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"},
}


@dataclass(frozen=True)
class Config:
    """preset: "cpu", "gpu" or "tiny"; cases: by name; rounds: processes of each side; limit: seconds of one of them.

    peer_python: the Python that has torch, transformers, TRL and diffusers, by default this one; vllm_python: the one
    that has vLLM, by default the peers'.
    """

    preset: str = "cpu"
    cases: tuple[str, ...] = tuple(CASES["cpu"])
    rounds: int = 2
    limit: float = 180.0
    peer_python: Path = Path(sys.executable)
    vllm_python: Path | None = None
    folder: Path = Path("runs/peers_cpu")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.cases) - CASES[self.preset].keys())
        if unknown:
            raise SystemExit(f"unknown case {unknown[0]!r}: choose among {', '.join(CASES[self.preset])}")
        for flag, python in (("--peer-python", self.peer_python), ("--vllm-python", self.vllm_python)):
            if python is not None and not python.is_file():
                raise SystemExit(f"{flag} {python} is not there: `make benchmark-peers` makes the peers' environment")


PRESETS = {
    "cpu": Config(),
    "gpu": Config("gpu", tuple(CASES["gpu"]), rounds=1, limit=420.0, folder=Path("runs/peers_gpu")),
    "tiny": Config("tiny", tuple(CASES["tiny"]), rounds=1, limit=120.0, folder=Path("runs/peers_tiny")),
}


def measure(name: str, case: Case, config: Config) -> dict[str, list[Outcome]]:
    """{side: its outcome in each round}. A side without an answer is not asked again."""
    outcomes: dict[str, list[Outcome]] = {side: [] for side in (OURS, *case.peers)}
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sysdpo_jax-peers-") as folder:
        told = {"work": as_json(case.work), "folder": folder}
        for number in range(config.rounds):
            for side, made in outcomes.items():
                if made and made[-1].answer is None:
                    continue
                if side != OURS and (given := outcomes[OURS][0].answer) is None:
                    made.append(Outcome("failed", "not asked: our side gave nothing to compare with"))
                    continue
                about = {**told, **SIDES[side].told, **({} if side == OURS else {"ours": given})}
                log = logs / f"{name}.{side.replace(' ', '_')}.{number}.txt"
                made.append(ask(python_of(side, config), f"{MODULE}.{SIDES[side].module}", about, config.limit, log))
                said = f"{made[-1].status} {made[-1].reason}".strip()
                print(f"{name}, {side}, round {number + 1} of {config.rounds}: {said}", file=sys.stderr, flush=True)
    return outcomes


def python_of(side: str, config: Config) -> Path:
    """The Python that runs a side."""
    if side == OURS:
        return Path(sys.executable)
    return config.vllm_python or config.peer_python if SIDES[side].vllm else config.peer_python


def main(arguments: list[str]) -> None:
    """Measure case by case, write results.json after each and print the table."""
    config = parse_preset(PRESETS, arguments, __doc__)
    device: Device = "gpu" if config.preset == "gpu" else "cpu"
    os.environ.update(ENVIRONMENT[device])
    path = config.folder / "results.json"
    results: dict[str, Any] = read_json(path) if path.exists() else {"cases": {}}
    before, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    roofline = gpu.apart(ours.roofline, device, ROOFLINES[config.preset])
    for name in config.cases:
        case = CASES[config.preset][name]
        found = summarise(case.work, measure(name, case, config), roofline, peak_flops(roofline["device"]))
        about = made_by(MODULE, arguments, ("python",), cores, f", load before {before:.1f}")
        results["cases"][name] = found | {"made_by": about}
        # In the order of the cases, whichever run made them.
        results["cases"] = {each: results["cases"][each] for each in CASES[config.preset] if each in results["cases"]}
        write_json(path, results)
    measured = {"cases": {name: results["cases"][name] for name in config.cases}}
    print(table(measured))
    wrong = failures(measured)
    if wrong:
        raise SystemExit("\n".join(wrong))


def _end(*_: object) -> None:
    raise SystemExit("ended by SIGTERM")


if __name__ == "__main__":
    # A side is in a session of its own: it must not go on when this process is told to end.
    signal.signal(signal.SIGTERM, _end)
    main(sys.argv[1:])
