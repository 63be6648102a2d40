"""Sample whole runs of a system on a file of prompts, with all intermediate values.

example:
  sysdpo rollout --system quickstart --prompts prompts.txt --samples 4 --output runs.jsonl

Every line of the output is {"id", "inputs", "outputs"}; images lie beside it. A run that a tool with `on_error: skip`
fails has the line {"id", "inputs", "error"}. Given again, the command makes what is missing, these runs included; a
file of another system, other prompts or another seed is refused. Several processes, found as in training, write a file
each and make the same runs as one.
"""

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import sysdpo_jax as sj
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import ResumableJsonl, file_digest, locked_file
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.loading import load_system
from sysdpo_jax.runs.prompts import read_prompts
from sysdpo_jax.runs.round_store import Which
from sysdpo_jax.runs.runs_file import Run, as_row, failed_row, lacks_images, noted_errors, read_lines
from sysdpo_jax.training import Board
from sysdpo_jax.typing import Params, Positive


@dataclass(frozen=True)
class Config:
    """What to sample.

    Args:
        system: A recipe, the YAML file or the folder of a run, or "module:function" that returns (system, parameters).
        prompts: JSON Lines of objects with the system's inputs, or a .txt file with a prompt a line.
        output: The file of runs.
        samples: Runs of each prompt.
        chunk: Prompts that are sampled and written together; part of what is drawn.
        seed: Of what is drawn.
        checkpoint: Of a run's folder, the newest or the one that evaluation found best.
        compilation_cache: Of compiled programs, user, none or a folder.
        ignore: Fields of prompts that are left unread.
    """

    system: str
    prompts: Path
    output: Path
    samples: Positive = 4
    chunk: Positive = 16
    seed: int = 0
    checkpoint: Which = "newest"
    compilation_cache: str = "user"
    ignore: tuple[str, ...] = ()


def roll_out(config: Config) -> Path:
    """Make the runs that are missing. Returns this process's file.

    Raises `ConfigError` for a file of other runs, and what cannot be used; the runs that are complete are kept.
    """
    keep_compilations(config.compilation_cache)
    index, count = jax.process_index(), jax.process_count()
    path = own_file(config.output)
    if not config.prompts.is_file():
        raise ConfigError(f"{config.prompts} does not exist: give a file of prompts")
    system, params, identity = load_system(config.system, config.checkpoint)
    file = ResumableJsonl(path, _about(config, identity))
    prompts = read_prompts(config.prompts, system, config.ignore)
    mine = range(0, len(prompts), config.chunk)[index::count]
    total = config.samples * sum(len(prompts[start : start + config.chunk]) for start in mine)
    made, failed, noted = _lines(file)
    images = ImageFiles(path)
    with Board() as board, board.phase("runs", len(made), total) as report:
        for start in mine:
            lines: list[Run] = []
            stop = None
            for name, run in _chunk(config, system, params, prompts, start, made):
                if not isinstance(run, ToolError):
                    lines.append(as_row(system, run, name, images))
                    made.add(name)
                    failed.pop(name, None)
                    continue
                prompt, sample = map(int, name.split("-"))
                named = run.at(f"{config.prompts}, prompt {prompt + 1}, sample {sample + 1}")
                if not run.skip:
                    stop = named
                    continue
                failed[name] = str(named)
                if (name, str(named)) not in noted:
                    lines.append(failed_row(system, prompts[prompt], name, named))
            # Where a tool stops the command, what it and others gave for other runs is not lost.
            if lines:
                file.append(lines)
            if stop is not None:
                raise stop
            report(len(made) + len(failed), f"{len(failed)} left out" if failed else "")
    if failed:
        first = next(iter(failed.values()))
        print(f"{path}: {len(failed)} of {total} runs are left out (the first: {first})", file=sys.stderr, flush=True)
    return path


def own_file(path: Path) -> Path:
    """Of several processes each writes a file."""
    index, count = jax.process_index(), jax.process_count()
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def _chunk(
    config: Config,
    system: sj.CompoundSystem,
    params: Params,
    prompts: Sequence[Mapping[str, Any]],
    start: int,
    made: Container[str],
) -> list[tuple[str, Any]]:
    """`run_batches` of one chunk, with the ids of the runs; of prompts that a tool refuses, the refusal alone.

    Those prompts are to be fixed, to which a file of runs would hold the command. Raises `RecordError` naming the
    chunk.
    """
    part, size = prompts[start : start + config.chunk], config.chunk * config.samples
    names = [f"{start + place // config.samples}-{place % config.samples}" for place in range(size)]
    done = {place for place, name in enumerate(names) if name in made}
    # The draws of a chunk depend on its first prompt's number alone: not on what was made before, or where.
    key = jax.random.fold_in(jax.random.key(config.seed), start)
    try:
        [batch] = run_batches(system, params, part, key, config.samples, size, made=done)
    except RecordError as error:
        # Numbers in it are those of the chunk.
        among = f"{config.prompts}, among prompts {start + 1} to {start + len(part)}"
        raise RecordError(f"{among}: {error}") from error
    refused = [isinstance(run, ToolError) and run.refused and not run.skip for _, run in batch]
    return [(names[place], run) for place, run in (batch[-1:] if any(refused) else batch)]


def _lines(file: ResumableJsonl) -> tuple[set[str], dict[str, str], set[tuple[Any, str]]]:
    """The ids of the runs that a file holds, why others are left out, by id, and its `noted_errors`.

    The end of the file whose images a machine that went down did not write is cut off.
    """
    rows = list(read_lines(file.path)) if file.path.exists() else []
    while rows and lacks_images(rows[-1], file.path):
        rows.pop()
    file.cut(len(rows))
    made = {row["id"] for row in rows if "outputs" in row}
    failed = {row["id"]: row["error"] for row in rows if "error" in row and row["id"] not in made}
    return made, failed, noted_errors(rows)


def _about(config: Config, identity: str) -> dict[str, str]:
    """What the runs depend on. identity: of the system."""
    return {
        "system": identity,
        "prompts": file_digest(config.prompts),
        "samples": str(config.samples),
        "chunk": str(config.chunk),
        "seed": str(config.seed),
    }


def run(config: Config) -> None:
    """Sample, and print the file."""
    with locked_file(own_file(config.output)):
        print(roll_out(config))
