"""Turn scored runs into preferences.

example:
  sysdpo pairs --runs runs.jsonl --scores scores.jsonl --output preferences.jsonl

Runs of the same prompt form a group; of each the best is preferred to the worst or, with --pairs all, every run to
every other of a lower score. The output is what `sysdpo train` reads; paths of images begin at its folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.data.formats import refuse_unread
from sysdpo_jax.data.rollouts import Pairs, Ties, preferred
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import locked_file, write_json_lines
from sysdpo_jax.runs.runs_file import Line, moved, read_lines, read_runs
from sysdpo_jax.typing import NotNegative


@dataclass(frozen=True)
class Config:
    """What to compare.

    A preference between equals teaches noise. Ties that are kept have the order in which the runs were made, which is
    a fair coin: train on them with label smoothing.

    Args:
        runs: Files that `sysdpo rollout` wrote.
        scores: Files that `sysdpo score` wrote.
        output: File to write the preferences to.
        pairs: Pairs of a prompt's runs: the best against the worst, or all.
        min_margin: Smallest difference of scores that makes a pair.
        ties: What to do with pairs of equal scores: drop or keep them.
    """

    runs: tuple[Path, ...]
    scores: tuple[Path, ...]
    output: Path
    pairs: Pairs = "best_worst"
    min_margin: NotNegative = 0.0
    ties: Ties = "drop"


def make_pairs(config: Config) -> str:
    """Write the preferences. Returns the counts in words.

    Runs that `sysdpo score` skipped are left out. Raises `ConfigError` naming a run without a score, a score without
    a run, and either that is there twice.
    """
    runs, (scores, skipped) = read_runs(config.runs), _scores(config.scores)
    groups: dict[str, list[tuple[float, Line]]] = {}
    for name, (path, run) in runs.items():
        if name not in scores and name not in skipped:
            raise ConfigError(f"{path}: the run {name!r} has no score: score these runs first")
        if name in scores:
            group = groups.setdefault(json.dumps(run["inputs"], sort_keys=True), [])
            group.append((scores[name], moved(run, path, config.output)))
    left = next((name for name in scores if name not in runs), None)
    if left is not None:
        raise ConfigError(f"the score of {left!r} is of no run in --runs: give all files of runs that were scored")
    lines, lone, tied = [], 0, 0
    for group in groups.values():
        values = np.array([value for value, _ in group], np.float64)
        pairs = preferred(values, config.pairs, config.min_margin, config.ties)
        lone += not pairs
        for better, worse in pairs:
            tied += values[better] == values[worse]
            first, second = group[better][1], group[worse][1]
            lines.append({"inputs": first["inputs"], "chosen": first["outputs"], "rejected": second["outputs"]})
    if not lines:
        without = f" ({len(skipped)} runs have no score)" if skipped else ""
        raise ConfigError(
            f"no two runs of a prompt differ by {config.min_margin:g} or more{without}: sample more, or lower it"
        )
    write_json_lines(config.output, lines)
    ties = f" ({tied} ties)" if config.ties == "keep" else ""
    said = f"{config.output}: {len(lines)} preferences{ties} of {len(groups)} prompts, {lone} of them without a pair"
    return said + (f"; {len(skipped)} runs have no score" if skipped else "")


def _scores(paths: tuple[Path, ...]) -> tuple[dict[str, float], set[str]]:
    """{id: score}, and the ids that have an error instead."""
    scores: dict[str, float] = {}
    failed: set[str] = set()
    for path in paths:
        for row in read_lines(path):
            if "outputs" in row:
                raise ConfigError(f"{path} holds runs, no scores: give the files of `sysdpo score`")
            try:
                refuse_unread(row, ("id", "score", "error"), remedy="leave it out")
            except RecordError as error:
                raise ConfigError(f"{path}: the score of {row.get('id')!r}: {error}") from None
            if row.get("id") is None:
                raise ConfigError(f"{path}: the score {row.get('score')!r} has no 'id': name the run that it is of")
            if row.get("error") is not None:
                failed.add(str(row["id"]))
                continue
            value = row.get("score")
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                raise ConfigError(f"{path}: the score of {row.get('id')!r} is {value!r}: give a finite number")
            if str(row.get("id")) in scores:
                raise ConfigError(f"{path}: the run {row['id']!r} has two scores: give every file of scores once")
            scores[str(row.get("id"))] = float(value)
    # A later start may have found what an earlier one did not.
    return scores, failed - scores.keys()


def run(config: Config) -> None:
    """Make the pairs, and print the counts."""
    with locked_file(config.output):
        print(make_pairs(config))
