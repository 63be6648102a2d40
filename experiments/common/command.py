"""The command line of an experiment: presets, a folder that belongs to one configuration, seeds side by side."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from sysdpo_jax.flags import fields_of, help_parser, parse_flags
from sysdpo_jax.io import InUseError, locked_folder, read_json, write_json
from sysdpo_jax.manifest import check_same
from sysdpo_jax.runs import keep_compilations
from sysdpo_jax.threads import DaemonExecutor
from sysdpo_jax.training import Board

C = TypeVar("C")


class SeedRun(Protocol):
    """All phases of one seed."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """{phase: seconds it took}."""
        ...

    def run(self) -> Any:
        """Do what is missing; the figures."""
        ...


R = TypeVar("R", bound=SeedRun)


def parse(default: C, arguments: Sequence[str], description: str | None) -> C:
    """The configuration with any flag's value in place of its own. Raises SystemExit after --help, and for no flag."""
    usage, _, about = (description or "").partition("\n\n")
    if {"-h", "--help"} & {*arguments}:
        help_parser("python -m MODULE [--FLAG VALUE ...]", usage, list(fields_of(default)), about).print_help()
        raise SystemExit(0)
    try:
        return parse_flags(default, arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def parse_preset(presets: Mapping[str, C], arguments: Sequence[str], description: str | None) -> C:
    """As `parse`, with the values of the preset that --preset names, of the first one without it."""
    words = [word for each in arguments for word in each.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else next(iter(presets))
    if name not in presets:
        raise SystemExit(f"error: --preset is {name!r}: give {' or '.join(presets)}")
    return parse(presets[name], arguments, description)


@contextmanager
def experiment_folder(folder: Path, run: Any) -> Iterator[None]:
    """The folder belongs to one configuration, a dataclass: phases of another must not be taken for this one's.

    For the block it is this process's alone. Compilations are kept in it too: methods, seeds and starts compile the
    same steps. Raises SystemExit.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except InUseError as error:
            raise SystemExit(f"error: {error}") from None
        path = folder / "config.json"
        if path.exists():
            noted = read_json(path)
            check_same(str(path), noted, dataclasses.asdict(run), "choose another --folder", SystemExit)
        write_json(path, dataclasses.asdict(run))
        keep_compilations(str(folder / "compiled"))
        yield


def run_seeds(seeds: Sequence[int], make: Callable[[int, Board], R]) -> tuple[dict[int, R], dict[int, Any]]:
    """{seed: its run} and {seed: what its `run` returned}. Raises SystemExit for no seeds or one given twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, seeds))}: give one or more different numbers")
    with Board() as board:
        runs = {seed: make(seed, board) for seed in seeds}
        if len(runs) == 1:
            # In this thread, where Ctrl-C stops it.
            return runs, {seed: run.run() for seed, run in runs.items()}
        # Small models leave cores idle: seeds run side by side, and a device takes their work in turn.
        with DaemonExecutor(min(len(runs), os.cpu_count() or 1), "seed") as pool:
            figures = dict(zip(runs, pool.map(lambda run: run.run(), runs.values()), strict=True))
    return runs, figures


def provenance(
    module: str, arguments: Sequence[str], runs: Mapping[int, SeedRun], evaluated_on: str, began: float
) -> dict[str, Any]:
    """What results.json says of how it was made. began: `time.monotonic()` of the start."""
    return {
        "seeds": list(runs),
        "phases": {f"seed {seed} {name}": s for seed, run in runs.items() for name, s in run.seconds.items()},
        "evaluated_on": evaluated_on,
        "made_by": {
            "command": " ".join([f"python -m {module}", *arguments]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "seconds_of_this_start": round(time.monotonic() - began, 1),
        },
    }
