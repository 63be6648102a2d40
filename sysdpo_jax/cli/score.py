"""Score runs, with a function of your own or a judge behind HTTP.

examples:
  sysdpo score --runs runs.jsonl --scorer my_package.judging:score --output scores.jsonl
  sysdpo score --runs runs.jsonl --judge.url http://localhost:8000/v1 --judge.model my-judge \\
      --judge.template question.txt --output scores.jsonl

A scorer takes a run, {input or node: value} with images as arrays in [0, 1], and returns a number, higher is better. A
judge is any server with OpenAI's chat completions; its template is a file with the run's values in braces. Lines are
{"id", "score"}, in the order in which scores come; given again, the command scores what has no score. A file of another
scorer or of other runs is refused.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.evaluation.scoring import about_scorer, check_scorer, counted, make_scorer, scores
from sysdpo_jax.io import file_digest, locked_file, note_of
from sysdpo_jax.runs.runs_file import Line, Outcomes, read_runs, values_of, with_images
from sysdpo_jax.training import Board

# So many runs without a score, and none with one, are no accident.
ENOUGH = 20


@dataclass(frozen=True)
class Config:
    """What to score.

    Args:
        runs: Files that `sysdpo rollout` wrote.
        output: File to write the scores to.
        scorer: "module:function", called with a run; a higher number is better.
        judge: Instead of a scorer, a model behind HTTP.
        on_error: What to do with a run without a score: stop, or skip it with a line {"id", "error"}.
    """

    runs: tuple[Path, ...]
    output: Path
    scorer: str = ""
    judge: JudgeConfig = JudgeConfig()
    on_error: Literal["stop", "skip"] = "stop"


def score(config: Config) -> Path:
    """Score the runs that have none yet. Raises `ConfigError`, with all scores before it kept."""
    scorer, runs = make_scorer(config.scorer, config.judge, "--"), read_runs(config.runs)
    if not runs:
        raise ConfigError("there is no run in --runs: give files of `sysdpo rollout`")
    # Runs mostly have values of the same names: the first of each kind is checked.
    kinds = {tuple(values_of(run)): f"run {name} of {path}" for name, (path, run) in reversed(runs.items())}
    for names, first in kinds.items():
        check_scorer(scorer, names, first)
    # Files of several processes have notes that say the same.
    sources = {file_digest(note_of(path)) if note_of(path).exists() else path.name for path in config.runs}
    about = {"runs": ", ".join(sorted(sources))} | about_scorer(config.scorer, config.judge)
    file = Outcomes(config.output, about)
    waiting = [name for name in runs if name not in file.made]

    def values(name: str) -> Line:
        path, run = runs[name]
        # Opened one by one: all images of a rollout would fill the memory.
        return values_of(with_images(run, path))

    before, failed = len(runs) - len(waiting), list[ScoreError]()
    found = scores(scorer, waiting, values, config.judge.parallel, config.on_error == "skip")
    with closing(found), Board() as board, board.phase("scores", before, len(runs)) as report:
        for done, (name, outcome) in enumerate(found, before + 1):
            if isinstance(outcome, ScoreError):
                failed.append(outcome)
                file.add([{"id": name, "error": str(outcome)}])
            else:
                file.add([{"id": name, "score": outcome}])
            if len(failed) == done >= min(ENOUGH, len(runs)):
                raise ConfigError(f"none of the first {done} runs has a score ({counted(failed)}); the last: {outcome}")
            report(done, f"{len(failed)} without a score" if failed else "")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs have no score: {counted(failed)}", file=sys.stderr)
    return config.output


def run(config: Config) -> None:
    """Score, and print the file."""
    with locked_file(config.output):
        print(score(config))
