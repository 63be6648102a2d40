"""Write a run's report.html again: what changed since the first evaluation, and how training went.

example:
  sysdpo report runs/my_run

The figures are those in the run's folder; nothing is sampled or scored. A run that is going on is left as it is.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.cli import command_line
from sysdpo_jax.io import locked_folder, read_json, write_json
from sysdpo_jax.report import ComparedRuns, write_report
from sysdpo_jax.report.outcome import compared_steps, run_report, run_results, summary
from sysdpo_jax.report.tables import compare_runs, spread
from sysdpo_jax.runs.files import CONFIG, write_config
from sysdpo_jax.runs.held_out import FOLDER, runs_name
from sysdpo_jax.runs.run import DATA, KEPT, Run, assemble, best_of, is_online, read_run, refuse_others, round_store
from sysdpo_jax.runs.runs_file import run_lines, with_images
from sysdpo_jax.training.metrics import read_metrics

# The run's folder may be given without its flag.
POSITIONAL = "directory"


@dataclass(frozen=True)
class Config:
    """What to report.

    Args:
        directory: Folder of the run.
    """

    directory: Path


def run(config: Config) -> None:
    """Write the report, and print its path. Raises `ConfigError` where the folder holds no run."""
    began, results, train = time.monotonic(), config.directory / "results.json", read_run(config.directory, needed=KEPT)
    with locked_folder(config.directory):
        made = assemble(train)
        known = read_json(results) if results.is_file() else {}
        print(write_run_report(made, known.get("made_by") or made_by(time.monotonic() - began)))


@contextmanager
def reported(run: Run, about: Mapping[str, Any], began: float) -> Iterator[Callable[[], None]]:
    """Around the training: a folder that holds a run of others is refused, and whatever ends it is reported.

    Yields what is called once nothing can refuse the run any more. about: The data, see `describe_data`.
    """
    folder, begun = Path(run.config.directory), False
    if jax.process_index() == 0:
        refuse_others(run, about)

    def accepted() -> None:
        nonlocal begun
        write_config(folder / CONFIG, run.config)
        write_json(folder / DATA, about)
        begun = True

    try:
        yield accepted
    finally:
        # After a stop or a value that is not finite the report is wanted most, once there is something to report.
        if begun and (folder / "metrics.jsonl").exists():
            _tell_result(run, began)


def _tell_result(run: Run, began: float) -> None:
    """Print the result and the report's path. Without a report the training is what it was, and so is what ended it."""
    try:
        for line in summary(_metrics(run), run.config.schedule.steps, best_of(run.config), _rounds(run)):
            print(line, flush=True)
        print(write_run_report(run, made_by(time.monotonic() - began)), flush=True)
    except Exception as error:
        print(f"warning: the report is not written: {error}", file=sys.stderr, flush=True)


def made_by(seconds: float) -> dict[str, Any]:
    """What a report says of the command that made it. seconds: that it took."""
    return {
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds of this start": round(seconds, 1),
    }


def write_run_report(run: Run, made_by: Mapping[str, Any]) -> Path:
    """Write report.html, whose path is returned, and results.json into the run's folder, in one process.

    Raises what reading the runs of evaluations and writing raise.
    """
    folder, rows = Path(run.config.directory), _metrics(run)
    data = read_json(folder / DATA)
    steps, best, rounds = run.config.schedule.steps, best_of(run.config), _rounds(run)
    results = run_results(rows, steps, best, rounds) | {"data": data, "made_by": dict(made_by)}
    if is_online(run.config):
        data["kept"] = sum(each["pairs"] - each["earlier"] for each in rounds)
        results |= {"rounds": rounds}
    write_json(folder / "results.json", results)
    title = f"{folder.name}: {', '.join(run.optimizer.trained_keys)} aligned as one system"
    runs = tuple(_compared_runs(run, compared_steps(rows, best)))
    report = run_report(title, rows, results, run.system, asdict(run.config), runs, best)
    write_report(folder / "report.html", report)
    return folder / "report.html"


def _rounds(run: Run) -> list[dict[str, Any]]:
    """Those of an online run that are done."""
    return [each._asdict() for each in round_store(run).summaries()] if is_online(run.config) else []


def _metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(Path(run.config.directory) / "metrics.jsonl")


def _compared_runs(run: Run, steps: Mapping[str, int]) -> Iterator[ComparedRuns]:
    """The first run of some prompts at the evaluations of `steps`, {name: step}, that before training first.

    As many prompts as `evaluation.shown`, evenly spaced: nobody chose them.
    """
    firsts = {name: _first_runs(run, step) for name, step in steps.items()}
    # A tool may have left a run out of one of them.
    both = [name for name in next(iter(firsts.values()), {}) if all(name in runs for runs in firsts.values())]
    for place in spread(len(both), run.config.evaluation.shown):
        made = {name: runs[both[place]] for name, runs in firsts.items()}
        whole = {name: with_images(line, path) for name, (line, path) in made.items()}
        yield compare_runs(whole, run.system.inputs, [node.name for node in run.system.recorded])


def _first_runs(run: Run, step: int) -> dict[str, tuple[dict[str, Any], Path]]:
    """{id: line and file} of the first run of each prompt."""
    path = Path(run.config.directory) / FOLDER / runs_name(step)
    return {line["id"]: (line, path) for line in run_lines(path) if line["id"].endswith("-0")}
