"""Score runs, with a function of your own or a judge behind HTTP.

    python -m experiments.score --runs runs.jsonl --scorer my_package.judging:score --output scores.jsonl
    python -m experiments.score --runs runs.jsonl --judge-url http://localhost:8000 --judge-model my-judge \
        --judge-template question.txt --output scores.jsonl

A scorer takes a run, {input or node: value} with images as arrays in [0, 1], and returns a number, higher is better. A
judge is any server with OpenAI's chat completions; its template is a file with the run's values in braces. Lines are
{"id", "score"}; given again, the command scores what is missing. A file of another scorer or of other runs is refused.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.own.appended import AppendedFile, digest, note_of
from experiments.own.command import user_errors
from experiments.own.config import ConfigError
from experiments.own.importing import import_object
from experiments.own.judge import NUMBER, Judge
from experiments.own.runs_file import Run, read_lines, run_lines, values_of, with_images
from experiments.own.scoring import Scorer, score_of
from sysdpo_jax.training import Board


@dataclass(frozen=True)
class Config:
    """runs: files of experiments.rollout. scorer: module:function; or judge_url, judge_model and judge_template.

    judge_number: regular expression that finds the score in the judge's answer; its last match counts, or that match's
    first group. judge_key: the environment variable of its API key. judge_timeout: seconds of a request. judge_retries:
    of a failed one. parallel: requests at a time.
    """

    runs: tuple[Path, ...]
    output: Path
    scorer: str | None = None
    judge_url: str | None = None
    judge_model: str = ""
    judge_template: Path | None = None
    judge_number: str = NUMBER
    judge_key: str = "OPENAI_API_KEY"
    judge_timeout: float = 60.0
    judge_retries: int = 5
    parallel: int = 4


def score(config: Config) -> Path:
    """Score the runs that have none yet. Raises `ConfigError`, with all scores before it kept."""
    scorer = _scorer(config)
    runs = _runs(config.runs)
    file = AppendedFile(config.output, _about(config))
    # A line that a killed process left half-written has no end.
    file.cut(file.count())
    known = {row.get("id") for row in read_lines(config.output)} if config.output.exists() else set()
    waiting = [name for name in runs if name not in known]
    threads = config.parallel if config.judge_url else 1

    def scored(name: str) -> Run:
        path, run = runs[name]
        # Opened one by one: all images of a rollout would fill the memory.
        return {"id": name, "score": score_of(scorer, values_of(with_images(run, path)), name)}

    done = len(runs) - len(waiting)
    with ThreadPoolExecutor(threads) as pool, Board() as board, board.phase("scores", done, len(runs)) as report:
        for start in range(0, len(waiting), threads):
            some = waiting[start : start + threads]
            file.append(list(pool.map(scored, some)))
            done += len(some)
            report(done, "")
    return config.output


def _runs(paths: Sequence[Path]) -> dict[str, tuple[Path, Run]]:
    """{id: (file, run)}. Raises `ConfigError` naming a run that is there twice, and for no runs."""
    runs: dict[str, tuple[Path, Run]] = {}
    for path in paths:
        for run in run_lines(path):
            if run["id"] in runs:
                raise ConfigError(f"{path}: the run {run['id']!r} is there twice: give every file of runs once")
            runs[run["id"]] = path, run
    if not runs:
        raise ConfigError("there is no run in --runs: give files of experiments.rollout")
    return runs


def _scorer(config: Config) -> Scorer:
    if (config.scorer is None) == (config.judge_url is None):
        raise ConfigError("give either --scorer or --judge-url")
    if config.parallel < 1:
        raise ConfigError(f"parallel {config.parallel} must be at least 1")
    if config.scorer is not None and config.judge_template is not None:
        raise ConfigError("--judge-template goes with --judge-url: leave it out with --scorer")
    if config.scorer is not None:
        scorer: Scorer = import_object(config.scorer, "--scorer")
        return scorer
    if not config.judge_model or config.judge_template is None:
        raise ConfigError("a judge needs --judge-model and --judge-template")
    return Judge(
        config.judge_url or "",
        config.judge_model,
        config.judge_template.read_text(encoding="utf-8"),
        config.judge_number,
        config.judge_key,
        config.judge_timeout,
        config.judge_retries,
    )


def _about(config: Config) -> dict[str, str]:
    """What the scores depend on. Files of several processes have notes that say the same."""
    sources = {digest(note_of(path)) if note_of(path).exists() else path.name for path in config.runs}
    about = {"runs": ", ".join(sorted(sources))}
    if config.judge_template is None:
        return about | {"scorer": str(config.scorer)}
    judge = {"judge_template": digest(config.judge_template), "judge_number": config.judge_number}
    return about | {"judge_model": config.judge_model} | judge


def main(arguments: list[str]) -> None:
    """Score, and print the file."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    with user_errors():
        print(score(config))


if __name__ == "__main__":
    main(sys.argv[1:])
