"""Score runs, with a function of your own or a judge behind HTTP.

    python -m experiments.score --runs runs.jsonl --scorer my_package.judging:score --output scores.jsonl
    python -m experiments.score --runs runs.jsonl --judge-url http://localhost:8000 --judge-model my-judge \
        --judge-template question.txt --output scores.jsonl

A scorer takes a run, {input or node: value} with images as arrays in [0, 1], and returns a number, higher is better. A
judge is any server with OpenAI's chat completions; its template is a file with the run's values in braces. Lines are
{"id", "score"}; given again, the command scores what is missing.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.own.command import user_errors
from experiments.own.config import ConfigError
from experiments.own.importing import import_object
from experiments.own.judge import Judge
from experiments.own.runs_file import Run, append_lines, count_lines, keep_lines, read_lines, read_runs, values_of
from experiments.own.scoring import Scorer, score_of
from sysdpo_jax.training import Board


@dataclass(frozen=True)
class Config:
    """runs: files of experiments.rollout. scorer: module:function; or judge_url, judge_model and judge_template.

    judge_key: the environment variable of its API key. judge_timeout: seconds of a request. judge_retries: of a failed
    one. parallel: requests at a time.
    """

    runs: tuple[Path, ...]
    output: Path
    scorer: str | None = None
    judge_url: str | None = None
    judge_model: str = ""
    judge_template: Path | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_timeout: float = 60.0
    judge_retries: int = 5
    parallel: int = 4


def score(config: Config) -> Path:
    """Score the runs that have none yet. Raises `ConfigError`, with all scores before it kept."""
    scorer = _scorer(config)
    runs = [run for path in config.runs for run in read_runs(path)]
    # A line that a killed process left half-written has no end.
    if config.output.exists():
        keep_lines(config.output, count_lines(config.output))
    known = {row["id"] for row in read_lines(config.output)} if config.output.exists() else set()
    waiting = [run for run in runs if run["id"] not in known]
    threads = config.parallel if config.judge_url else 1

    def scored(run: Run) -> Run:
        return {"id": run["id"], "score": score_of(scorer, values_of(run), run["id"])}

    done = len(runs) - len(waiting)
    with ThreadPoolExecutor(threads) as pool, Board() as board, board.phase("scores", done, len(runs)) as report:
        for start in range(0, len(waiting), threads):
            some = waiting[start : start + threads]
            append_lines(config.output, list(pool.map(scored, some)))
            done += len(some)
            report(done, "")
    return config.output


def _scorer(config: Config) -> Scorer:
    if (config.scorer is None) == (config.judge_url is None):
        raise ConfigError("give either --scorer or --judge-url")
    if config.scorer is not None:
        scorer: Scorer = import_object(config.scorer, "--scorer")
        return scorer
    if not config.judge_model or config.judge_template is None:
        raise ConfigError("a judge needs --judge-model and --judge-template")
    template = config.judge_template.read_text(encoding="utf-8")
    url, timeout, retries = config.judge_url or "", config.judge_timeout, config.judge_retries
    return Judge(url, config.judge_model, template, config.judge_key, timeout, retries)


def main(arguments: list[str]) -> None:
    """Score, and print the file."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    with user_errors():
        print(score(config))


if __name__ == "__main__":
    main(sys.argv[1:])
