"""Sample whole runs of a system on a file of prompts, with all intermediate values.

    python -m experiments.rollout --system my_run.yaml --prompts prompts.jsonl --samples 4 --output runs.jsonl

`--system` is the YAML file of a run, the folder of a run that has trained, or "module:function" of a function that
returns (system, parameters). Prompts: objects with the system's inputs, or a .txt file. Every line
of the output is {"id", "inputs", "outputs"}; images lie beside it. Given again, the command makes what is missing; a
file of another system, other prompts or another seed is refused. Several processes, found as in training, write a file
each and make the same runs as one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax

import sysdpo_jax as sj
from experiments.common.compilation import keep_compilations
from experiments.own.appended import AppendedFile, digest
from experiments.own.command import bounded_exit, user_errors
from experiments.own.config import ConfigError, Positive, parse_flags
from experiments.own.loading import Which, load_system
from experiments.own.prompts import read_prompts
from experiments.own.runs_file import as_row
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.saving import ImageFiles
from sysdpo_jax.locks import locked_file
from sysdpo_jax.training import Board


@dataclass(frozen=True)
class Config:
    """samples: runs of each prompt. chunk: prompts that are sampled and written together; part of what is drawn.

    checkpoint: of a run's folder, the newest or the one that evaluation found best. compilation_cache: see
    `keep_compilations`. ignore: fields of prompts that are left unread.
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

    Raises `ConfigError` for a file of other runs, and what cannot be used.
    """
    keep_compilations(config.compilation_cache)
    index, count = jax.process_index(), jax.process_count()
    path = own_file(config.output)
    if not config.prompts.is_file():
        raise ConfigError(f"{config.prompts} does not exist: give a file of prompts")
    system, params, identity = load_system(config.system, config.checkpoint)
    file = AppendedFile(path, _about(config, identity))
    prompts = read_prompts(config.prompts, system, config.ignore)
    mine = range(0, len(prompts), config.chunk)[index::count]
    sizes = [config.samples * len(prompts[start : start + config.chunk]) for start in mine]
    done = _whole_chunks(file, sizes)
    images, key = ImageFiles(path), jax.random.key(config.seed)
    with Board() as board, board.phase("runs", sum(sizes[:done]), sum(sizes)) as report:
        for place in range(done, len(sizes)):
            start = mine[place]
            part = prompts[start : start + config.chunk]
            # The draws of a chunk depend on its first prompt's number alone: not on what was made before, or where.
            own = jax.random.fold_in(key, start)
            try:
                runs = sj.rollout(system, params, part, own, config.samples, config.chunk * config.samples)
            except RecordError as error:
                # Its rows are those of the chunk, samples included.
                raise RecordError(
                    f"{config.prompts}, among prompts {start + 1} to {start + len(part)}: {error}"
                ) from error
            names = [f"{start + number // config.samples}-{number % config.samples}" for number in range(len(runs))]
            file.append([as_row(system, run, name, images) for run, name in zip(runs, names, strict=True)])
            report(sum(sizes[: place + 1]), "")
    return path


def own_file(path: Path) -> Path:
    """Of several processes each writes a file."""
    index, count = jax.process_index(), jax.process_count()
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def _about(config: Config, identity: str) -> dict[str, str]:
    """What the runs depend on. identity: of the system."""
    return {
        "system": identity,
        "prompts": digest(config.prompts),
        "samples": str(config.samples),
        "chunk": str(config.chunk),
        "seed": str(config.seed),
    }


def _whole_chunks(file: AppendedFile, sizes: list[int]) -> int:
    """How many chunks the file holds; what is there of another one is cut off."""
    lines, done = file.count(), 0
    while done < len(sizes) and lines >= sum(sizes[: done + 1]):
        done += 1
    file.cut(sum(sizes[:done]))
    return done


def main(arguments: list[str]) -> None:
    """Sample, and print the file."""
    with user_errors():
        config = parse_flags(Config, arguments, __doc__)
        with locked_file(own_file(config.output)):
            print(roll_out(config))


if __name__ == "__main__":
    with bounded_exit():
        sj.initialize()
        main(sys.argv[1:])
