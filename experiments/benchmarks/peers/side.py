"""What every side's process shares: what it is given, how it times, and the line that it answers with.

It loads neither JAX nor torch.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.benchmarks.peers.work import from_json

ANSWER = "measured: "
# So many new tokens of each row must be the same: later ones part where rounding decides between two tokens.
COMPARED_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """What a side answers.

    seconds: of each timed step. first_seconds: from having loaded its packages to the end of the first step, with
    making the model and compiling. checks: what the sides must agree on. peak_bytes: of the device; on a CPU the most
    memory that the process has held at once. parameters, peak_bytes: None where another process has them. about: what
    is only noted.
    """

    seconds: list[float]
    first_seconds: float
    parameters: int | None
    checks: Mapping[str, Any]
    peak_bytes: float | None
    device: str
    versions: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)


def peak_rss() -> float:
    """Bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def versions(*packages: str) -> dict[str, str]:
    """Those installed."""
    return {name: version(name) for name in packages}


def timed(run: Callable[[], None], wait: Callable[[], None], repeats: int, steps: int) -> list[float]:
    """Seconds of a run in each repetition of `steps` runs that follow each other without waiting."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        seconds.append((time.perf_counter() - began) / steps)
    return seconds


def answer(measure: Callable[[Any, Path, Mapping[str, Any]], Measured]) -> None:
    """Measure what the command line says, {"work", "folder", "ours", ...} in JSON, and print the answer's line."""
    told = json.loads(sys.argv[1])
    made = measure(from_json(told["work"]), Path(told["folder"]), told)
    print(ANSWER + json.dumps(asdict(made)), flush=True)
