"""Sample whole runs of a system on a file of prompts, with all intermediate values.

    python -m experiments.rollout --system my_run.yaml --prompts prompts.jsonl --samples 4 --output runs.jsonl

`--system` is the YAML file of a run, the folder of a run that has trained (its newest checkpoint), or "module:function"
of a function that returns (system, parameters). Prompts: objects with the system's inputs, or a .txt file. Every line
of the output is {"id", "inputs", "outputs"}; images lie beside it. Given again, the command makes what is missing.
Several processes, found as in training, write a file each and make the same runs as one.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import tyro

import sysdpo_jax as sj
from experiments.own.command import user_errors
from experiments.own.config import ConfigError
from experiments.own.loading import load_system
from experiments.own.prompts import read_prompts
from experiments.own.runs_file import append_lines, as_row, count_lines, keep_lines
from sysdpo_jax.data.saving import ImageFiles
from sysdpo_jax.training import Board


@dataclass(frozen=True)
class Config:
    """samples: runs of each prompt. chunk: prompts that are sampled and written together; part of what is drawn."""

    system: str
    prompts: Path
    output: Path
    samples: int = 4
    chunk: int = 16
    seed: int = 0


def roll_out(config: Config) -> Path:
    """Make the runs that are missing. Returns this process's file.

    Raises `ConfigError` for a file of other runs, and what cannot be used.
    """
    if config.samples < 1 or config.chunk < 1:
        raise ConfigError(f"samples {config.samples} and chunk {config.chunk} must be at least 1")
    index, count = jax.process_index(), jax.process_count()
    path = config.output if count == 1 else _shard(config.output, index, count)
    _claim(path, config)
    system, params = load_system(config.system)
    prompts = read_prompts(config.prompts, system)
    mine = range(0, len(prompts), config.chunk)[index::count]
    sizes = [config.samples * len(prompts[start : start + config.chunk]) for start in mine]
    done = _whole_chunks(path, sizes)
    images, key = ImageFiles(path), jax.random.key(config.seed)
    with Board() as board, board.phase("runs", sum(sizes[:done]), sum(sizes)) as report:
        for place in range(done, len(sizes)):
            start = mine[place]
            part = prompts[start : start + config.chunk]
            # The draws of a chunk depend on its first prompt's number alone: not on what was made before, or where.
            own = jax.random.fold_in(key, start)
            runs = sj.rollout(system, params, part, own, config.samples, config.chunk * config.samples)
            names = [f"{start + number // config.samples}-{number % config.samples}" for number in range(len(runs))]
            append_lines(path, [as_row(system, run, name, images) for run, name in zip(runs, names, strict=True)])
            report(sum(sizes[: place + 1]), "")
    return path


def _shard(path: Path, index: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def _claim(path: Path, config: Config) -> None:
    """A file holds the runs of one configuration. Raises `ConfigError` where it is another's."""
    about = {name: str(value) for name, value in asdict(config).items() if name != "output"}
    note = path.with_suffix(".json")
    if note.exists():
        noted = json.loads(note.read_text(encoding="utf-8"))
        differing = [name for name, value in about.items() if noted.get(name) != value]
        if differing:
            raise ConfigError(
                f"{path} holds runs with another {', '.join(differing)} (see {note}): name another output"
            )
    elif path.exists():
        raise ConfigError(f"{path} exists, and nothing says which runs it holds: name another output")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _whole_chunks(path: Path, sizes: list[int]) -> int:
    """How many chunks the file holds; what is there of another one is cut off."""
    lines, done = count_lines(path), 0
    while done < len(sizes) and lines >= sum(sizes[: done + 1]):
        done += 1
    if path.exists():
        keep_lines(path, sum(sizes[:done]))
    return done


def main(arguments: list[str]) -> None:
    """Sample, and print the file."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    with user_errors():
        print(roll_out(config))


if __name__ == "__main__":
    sj.initialize()
    main(sys.argv[1:])
