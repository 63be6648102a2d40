"""A side's process: started, waited for so long and no longer, and its answer or the reason why there is none."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.benchmarks.peers.side import ANSWER

ROOT = Path(__file__).parents[3]
Status = Literal["measured", "not installed", "cut off", "failed", "other work"]


@dataclass(frozen=True)
class Outcome:
    """What became of a side. reason: why it was not measured; answer: that of `Measured`."""

    status: Status
    reason: str = ""
    answer: Mapping[str, Any] | None = None


def ask(python: Path, module: str, told: Mapping[str, Any], limit: float, log: Path) -> Outcome:
    """Run a side. limit: seconds; log: what it says besides is written there."""
    command = [str(python), "-m", module, json.dumps(told)]
    with log.open("w", encoding="utf-8") as errors:
        # A group of its own: compilers and engines that it starts end with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        with process:
            try:
                said, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return Outcome("cut off", f"not done after {limit:.0f} s")
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    answers = [line.removeprefix(ANSWER) for line in said.splitlines() if line.startswith(ANSWER)]
    if process.returncode == 0 and answers:
        return Outcome("measured", answer=json.loads(answers[-1]))
    reason = reason_of(log.read_text(encoding="utf-8", errors="replace"), process.returncode)
    return Outcome("not installed" if reason.startswith("ModuleNotFoundError") else "failed", reason)


def reason_of(log: str, code: int) -> str:
    """The last line that names an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    last = (named or lines or ["it said nothing"])[-1]
    return last[:300] if code == 1 else f"exit code {code}: {last[:300]}"
