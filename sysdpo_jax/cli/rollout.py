"""Sample whole runs of a system on a file of prompts, with all intermediate values.

example:
  sysdpo rollout --system quickstart --prompts prompts.txt --samples 4 --output runs.jsonl

Every line of the output is {"id", "inputs", "outputs"}; images lie beside it. A run that a tool with `on_error: skip`
fails has the line {"id", "inputs", "error"}. Given again, the command makes what is missing, these runs included; a
file of another system, other prompts or another seed is refused. Several processes, found as in training, write a file
each and make the same runs as one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import file_digest, locked_file
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.config import Which
from sysdpo_jax.runs.run import load_system
from sysdpo_jax.runs.runs_file import Outcomes, keep_runs, read_prompts
from sysdpo_jax.serving import gaps_in
from sysdpo_jax.training import Board
from sysdpo_jax.typing import Natural, Positive


@dataclass(frozen=True)
class Config:
    """What to sample.

    Args:
        system: A recipe, a run's YAML file or folder, or "module:function" that returns (system, parameters).
        prompts: File of prompts: JSON Lines with the system's inputs, or a .txt file with one prompt a line.
        output: File to write the runs to.
        samples: Runs of each prompt.
        chunk: Prompts that are sampled and written together; another number gives other samples.
        seed: Seed of the samples.
        checkpoint: Checkpoint of a run's folder: the newest, or the one that evaluation found best.
        compilation_cache: Where compiled programs are kept: user, none or a folder.
        ignore: Fields of the prompts that may be left unread.
    """

    system: str
    prompts: Path
    output: Path
    samples: Positive = 4
    chunk: Positive = 16
    seed: Natural = 0
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
    about = {name: str(getattr(config, name)) for name in ("samples", "chunk", "seed")}
    about |= {"system": identity, "prompts": file_digest(config.prompts)}
    file, images = Outcomes(path, about, ids_only=True), ImageFiles(path)
    prompts = read_prompts(config.prompts, system, config.ignore)
    mine = range(0, len(prompts), config.chunk)[index::count]
    total = config.samples * sum(len(prompts[start : start + config.chunk]) for start in mine)

    def chunk(start: int) -> list[tuple[str, Any]]:
        """`run_batches` of a chunk, with the ids of the runs; of the first prompts that a tool refuses, that alone.

        Those prompts are to be fixed, to which a file of runs would hold the command: it is not begun with them. One
        that has runs keeps the others of the chunk too. Raises `RecordError` naming the chunk.
        """
        part, size = prompts[start : start + config.chunk], config.chunk * config.samples
        names = [f"{start + place // config.samples}-{place % config.samples}" for place in range(size)]
        done = {place for place, name in enumerate(names) if name in file.made}
        # The draws of a chunk depend on its first prompt's number alone: not on what was made before, or where.
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        try:
            [batch] = run_batches(system, params, part, key, config.samples, size, made=done)
        except RecordError as error:
            # Numbers in it are those of the chunk.
            among = f"{config.prompts}, among prompts {start + 1} to {start + len(part)}"
            raise RecordError(f"{among}: {error}") from error
        refused = [isinstance(run, ToolError) and run.refused and not run.skip for _, run in batch]
        return [(names[place], run) for place, run in (batch[-1:] if any(refused) and not file.made else batch)]

    with Board() as board, board.phase("runs", len(file.made), total) as report:
        for start in mine:
            # Where a tool stops the command, what it and others gave for other runs is not lost.
            keep_runs(file, system, prompts, chunk(start), images, f"{config.prompts}, ")
            failed = len(file.failed)
            beside = (f"{failed} left out" if failed else "", gaps_in(system))
            report(len(file.made) + failed, ", ".join(filter(None, beside)))
    if file.failed:
        first = next(iter(file.failed.values()))["error"]
        said = f"{path}: {len(file.failed)} of {total} runs are left out (the first: {first})"
        print(said, file=sys.stderr, flush=True)
    return path


def own_file(path: Path) -> Path:
    """Of several processes each writes a file."""
    index, count = jax.process_index(), jax.process_count()
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def run(config: Config) -> None:
    """Sample, and print the file."""
    with locked_file(own_file(config.output)):
        print(roll_out(config))
