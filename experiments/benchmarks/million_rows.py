"""Reading a large file of preferences: rows a second, and how much memory grows.

    python -m experiments.benchmarks.million_rows > docs/benchmarks/million_rows.json

The file is written to a temporary folder. Memory is the most that the process holds of its own while it reads (Linux's
RssAnon, looked at every 20 ms), less what it held before; pages of the memory-mapped file are the system's.
"""

import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import sysdpo_jax as sj


@dataclass(frozen=True)
class Config:
    """rows: of the file."""

    rows: int = 1_000_000


def write(path: Path, rows: int) -> None:
    """A question and two answers of some forty words a row."""
    words = ("the", "red", "ball", "on", "the", "left", "is", "larger", "than", "a", "small", "green", "cube") * 2
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turned = " ".join(words[number % 7 : number % 7 + 18])
            row = {
                "inputs": {"question": f"question {number}?"},
                "chosen": {"answer": f"{turned} {number}"},
                "rejected": {"answer": f"{number} {turned} {turned}"},
            }
            file.write(json.dumps(row) + "\n")


def measure(rows: int) -> dict[str, Any]:
    """Write, read, and look at records from the beginning, the middle and the end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preferences.jsonl"
        write(path, rows)
        # The libraries that reading needs, and their caches, are not the file's.
        write(Path(folder) / "small.jsonl", 1)
        sj.load_preferences(Path(folder) / "small.jsonl")
        before, began = _own(), time.monotonic()
        with _watched() as seen:
            preferences = sj.load_preferences(path)
        seconds = time.monotonic() - began
        for row in (0, rows // 2, rows - 1):
            found = preferences[row].inputs["question"]
            if found != f"question {row}?":
                raise RuntimeError(f"record {row} is {found!r}")
        return {
            "rows": len(preferences),
            "file_mib": round(path.stat().st_size / 2**20, 1),
            "rows_per_second": round(rows / seconds),
            "memory_growth_mib": round((max(seen) - before) / 2**20, 1),
        }


def _own() -> int:
    """Bytes of memory that are this process's own."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@contextmanager
def _watched() -> Iterator[list[int]]:
    """What `_own` is from time to time, as long as the block lasts."""
    seen, done = [_own()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(_own())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    result = measure(config.rows)
    result["made_by"] = {
        "command": " ".join(["python -m experiments.benchmarks.million_rows", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
