"""Propose a system, its records and preferences from traces of a program that runs already.

example:
  sysdpo import traces.jsonl --format openinference --output proposal --model draft=my_model --model answer=my_model

Spans of models, retrievers and tools become nodes; where the text of one occurs in the prompt of another it is a
parent. The folder gets system.yaml, which `sysdpo train` takes, preferences.jsonl, the runs and scores that these come
from, and report.txt, which says what became of every span. docs/traces.md explains the formats.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdpo_jax.cli import pairs
from sysdpo_jax.data.rollouts import Pairs, Ties
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import locked_file, write_json_lines, write_whole
from sysdpo_jax.traces.choices import Flags
from sysdpo_jax.traces.files import Format
from sysdpo_jax.traces.importing import import_traces
from sysdpo_jax.traces.report import report_text, summary
from sysdpo_jax.traces.system_file import system_text
from sysdpo_jax.typing import NotNegative

POSITIONAL = "traces"


@dataclass(frozen=True)
class Config:
    """What to read, and what of it is trained.

    Without a flag that names models, and on a terminal, each model is asked for.

    Args:
        traces: File of traces (JSON, JSON Lines or Parquet), or a folder of such files.
        format: How they are written.
        output: Folder for the proposal.
        model: Checkpoints as NAME=CHECKPOINT, where NAME is a node or a model that the traces name.
        train: Nodes of models that are trained; by default those that have a checkpoint.
        frozen: Nodes of models that are computed and not trained.
        tool: Nodes whose recorded values alone are used; by default those without a checkpoint.
        score: Name of the annotation or score that says which run is better; the only one by default.
        scores: File of scores by trace_id or span_id, instead of those in the traces.
        pairs: Pairs of a request's runs: the best against the worst, or all.
        min_margin: Smallest difference of scores that makes a pair.
        ties: What to do with pairs of equal scores: drop or keep them.
    """

    traces: Path
    format: Format
    output: Path
    model: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    score: str = ""
    scores: Path | None = None
    pairs: Pairs = "best_worst"
    min_margin: NotNegative = 0.0
    ties: Ties = "drop"


def run(config: Config) -> None:
    """Write the proposal, and print what was read.

    Raises:
        ConfigError: As `import_traces`; for a system.yaml that is there and says something else, which somebody may
            have edited; and where no two runs of a request differ in their scores.
    """
    with locked_file(config.output / "system.yaml"):
        _write(config)


def _write(config: Config) -> None:
    asked = _answer if sys.stdin.isatty() and sys.stdout.isatty() else None
    flags = Flags(config.train, config.frozen, config.tool, config.model)
    made = import_traces(config.traces, config.format, flags, config.score, config.scores, asked)
    folder = config.output
    runs, scores, system = (folder / name for name in ("runs.jsonl", "scores.jsonl", "system.yaml"))
    write_json_lines(runs, made.runs)
    write_json_lines(scores, made.scores)
    write_whole(folder / "report.txt", report_text(made.ledger, made.notes, made.tokens))
    print(summary(made.ledger))
    for note in [*made.notes, *(f"tokens of {name}: {counted}" for name, counted in made.tokens.items())]:
        print(note)
    target = folder / "preferences.jsonl"
    said = pairs.make_pairs(pairs.Config((runs,), (scores,), target, config.pairs, config.min_margin, config.ties))
    print(said)
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    trained = [name for name, choice in made.choices.items() if choice.how == "train"]
    if alike := sum(_alike(line, trained) for line in lines):
        print(f"in {alike} of them both runs have the same answers of all models that are trained")
    title = f"Proposed by `sysdpo import` from {config.traces} ({config.format}).\n\n  sysdpo train {system} --dry-run"
    text = system_text(title, made.inputs, made.nodes, made.spans, made.choices, made.tokens, len(lines))
    if system.exists() and system.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{system} is there and says something else: move it, or name another --output")
    write_whole(system, text)
    print(f"{system}: check it, then sysdpo train {system} --dry-run")


def _alike(pair: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether both sides have the same values, whatever the ids of their calls of tools."""
    chosen, rejected = pair["chosen"], pair["rejected"]
    return all(name in chosen and _without_ids(chosen[name]) == _without_ids(rejected.get(name)) for name in names)


def _without_ids(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_ids(item) for name, item in value.items() if name not in ("id", "tool_call_id")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def _answer(question: str) -> str:
    """What a person says, nothing at the end of their input."""
    try:
        return input(question)
    except EOFError:
        return ""
