"""Ask people which of two runs is better, on a local page.

examples:
  sysdpo annotate runs.jsonl --output preferences.jsonl
  sysdpo annotate before.jsonl after.jsonl --output preferences.jsonl --annotator Ann
  sysdpo annotate runs.jsonl --export label_studio --output tasks.json
  sysdpo annotate runs.jsonl --answers export.json --output preferences.jsonl

One file of `sysdpo rollout`: all two runs of a prompt. Two files: run against run of two systems, left and right by
chance, and nothing on the page says which is which. The output is what `sysdpo train` reads; the answers themselves are
beside it in OUTPUT.answers.jsonl, and the same command goes on where it was. Ctrl-C ends it. With --export the pairs
become tasks of Label Studio or Argilla instead; with --answers what people said there becomes the preferences.
"""

from dataclasses import dataclass
from pathlib import Path

from sysdpo_jax.annotation.answers import Answers, answers_of, preferences, summary
from sysdpo_jax.annotation.comparisons import Comparisons, compare
from sysdpo_jax.annotation.exchange import Tool, read_answers, tasks
from sysdpo_jax.annotation.server import AskingServer
from sysdpo_jax.cli.ending import Terminated
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import file_digest, locked_file, write_json, write_json_lines
from sysdpo_jax.typing import Natural

POSITIONAL = "runs"


@dataclass(frozen=True)
class Config:
    """What to ask.

    Args:
        runs: One or two files that `sysdpo rollout` wrote.
        output: File to write the preferences to, or the tasks.
        annotator: Who answers, for the file of answers.
        nodes: Nodes whose values are shown; all by default.
        seed: Of the order of the pairs, and of the sides.
        port: Of the page on 127.0.0.1; 0 takes a free one.
        export: Write tasks for label_studio or argilla, and ask nobody.
        answers: An export of Label Studio or Argilla with answers to such tasks, and ask nobody.
    """

    runs: tuple[Path, ...]
    output: Path
    annotator: str = ""
    nodes: tuple[str, ...] = ()
    seed: int = 0
    port: Natural = 0
    export: Tool | None = None
    answers: Path | None = None


def export(config: Config, comparisons: Comparisons, tool: Tool) -> str:
    """Write the tasks. Returns what was done, in words."""
    write_json(config.output, tasks(comparisons.found, config.nodes, tool))
    return f"{config.output}: {len(comparisons.found)} tasks for {tool}{_left_out(comparisons)}"


def take_answers(config: Config, comparisons: Comparisons, answers: Path) -> str:
    """Write the preferences of what people answered elsewhere. Returns the counts in words.

    Raises `ConfigError` for answers that are not of these runs, and for an output whose answers were given on the page.
    """
    if answers_of(config.output).exists():
        raise ConfigError(f"{config.output} is made of {answers_of(config.output)}: name another output")
    judgements, again = read_answers(answers, comparisons.found)
    write_json_lines(config.output, preferences(judgements, config.output))
    said = f"{again} answers to pairs that the same person answered again: the last one holds\n" if again else ""
    return said + summary(judgements, config.runs, config.output)


def ask(config: Config, comparisons: Comparisons) -> str:
    """Serve the page until Ctrl-C. Returns the counts in words. Raises `Terminated` after a SIGTERM."""
    about = {
        "runs": ", ".join(sorted(map(file_digest, config.runs))),
        "seed": str(config.seed),
        "nodes": ", ".join(config.nodes),
        "annotator": config.annotator,
    }
    answers = Answers(config.output, comparisons.found, about)
    with AskingServer(comparisons.found, answers, config.nodes, config.port) as server:
        number = len(comparisons.found)
        print(f"{number} pairs, {answers.place} of them answered{_left_out(comparisons)}", flush=True)
        print(f"open {server.address} in a browser of this machine; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            # People end it when they have had enough.
            print(flush=True)
        finally:
            # An answer that is just being written is finished, and no other begins.
            server.lock.acquire()
    return summary(answers.judgements, config.runs, config.output)


def _left_out(comparisons: Comparisons) -> str:
    return f"; {comparisons.same} more show the same on both sides and are not asked" if comparisons.same else ""


def run(config: Config) -> None:
    """Ask, export or import, and print the counts."""
    if config.export and config.answers:
        raise ConfigError("--export and --answers: give one of them")
    if config.output.absolute() in (path.absolute() for path in (*config.runs, config.answers) if path):
        raise ConfigError(f"--output {config.output} is a file that is read: name another output")
    with locked_file(config.output):
        comparisons = compare(config.runs, config.nodes, config.seed)
        if config.export:
            print(export(config, comparisons, config.export))
        elif config.answers:
            print(take_answers(config, comparisons, config.answers))
        else:
            print(ask(config, comparisons))
