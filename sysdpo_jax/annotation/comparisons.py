"""Which two runs are compared, in which order, and which of them is on the left: blind to where they come from."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.io import file_digest
from sysdpo_jax.runs.runs_file import Line, lacks_images, map_images, run_lines
from sysdpo_jax.values import content, from_json

# Letters of an id: a page shows it, and nobody can read from it what it stands for.
LETTERS = 20


@dataclass(frozen=True)
class Side:
    """A run of a comparison.

    name: for whoever reads the answers, never for whoever gives them. place: of its file. prompt: equal for equal
    inputs.
    """

    run: Line
    path: Path
    name: str
    place: int
    prompt: str


@dataclass(frozen=True)
class Comparison:
    """Two runs of a prompt as they are shown. id: a digest of both in this order: no answer can change sides."""

    id: str
    left: Side
    right: Side


@dataclass(frozen=True)
class Comparisons:
    """What is asked. found: in the order of asking. same: how many pairs are left out, whose sides show the same."""

    found: tuple[Comparison, ...]
    same: int


def compare(paths: Sequence[Path], nodes: Sequence[str], seed: int) -> Comparisons:
    """The comparisons of one file's runs, all two of a prompt, or of two files, run against run of the same id.

    The first of each prompt come first, then the second of each: whoever stops early has seen the most prompts.

    Args:
        paths: One or two files of `sysdpo rollout`.
        nodes: Whose values are shown, all by default: pairs with equal ones are left out.
        seed: Of the order and of the sides.

    Raises:
        ConfigError: Runs that cannot be compared: names the file and what is wrong.
    """
    if len(paths) not in (1, 2) or len({*paths}) < len(paths):
        raise ConfigError(f"{len(paths)} files of runs: give one, or two different ones, to compare their runs")
    files = [_sides(path, place, len(paths) > 1) for place, path in enumerate(paths)]
    _check_nodes(files, nodes)
    pairs = list(_matched(*files) if len(files) > 1 else _of_a_prompt(files[0]))
    asked = [pair for pair in pairs if _shown(pair[0], nodes) != _shown(pair[1], nodes)]
    if not asked:
        raise ConfigError(
            f"{' and '.join(map(str, paths))}: no two runs of a prompt differ in what is shown: sample more of each "
            "prompt (--samples of `sysdpo rollout`)"
        )
    return Comparisons(tuple(_in_turns([_placed(pair, seed) for pair in asked], seed)), len(pairs) - len(asked))


def _sides(path: Path, place: int, several: bool) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    for run in run_lines(path):
        if run["id"] in sides:
            raise ConfigError(f"{path}: the run {run['id']!r} is there twice: take one of them out")
        if lacks_images(run, path):
            raise ConfigError(
                f"{path}, run {run['id']}: a picture is not there: keep {path.stem}_images beside the file"
            )
        name = f"{path.name} {run['id']}" if several else run["id"]
        sides[run["id"]] = Side(run, path, name, place, _what_is_seen(run["inputs"], path))
    if not sides:
        raise ConfigError(f"{path} holds no run: give a file of `sysdpo rollout`")
    return sides


def _check_nodes(files: Sequence[Mapping[str, Side]], nodes: Sequence[str]) -> None:
    """Raise `ConfigError` for a node that no run has, and for files of systems that differ."""
    known = [{name: None for side in sides.values() for name in side.run["outputs"]} for sides in files]
    for sides, names in zip(files, known, strict=True):
        path = next(iter(sides.values())).path
        for name in nodes:
            if name not in names:
                raise ConfigError(f"--nodes: {path} has no node {name!r}: {meant(name, names)}")
    if nodes or len(files) == 1:
        return
    # Of a system with a switch not every run has every node.
    for sides, others in (files, files[::-1]):
        always = set.intersection(*({*side.run["outputs"]} for side in sides.values()))
        unknown = always - {name for side in others.values() for name in side.run["outputs"]}
        if unknown:
            path, other = (next(iter(each.values())).path for each in (sides, others))
            raise ConfigError(
                f"{path} and {other} are of different systems: {other} has no node {sorted(unknown)[0]!r}: give runs "
                "of systems with the same nodes, or name with --nodes what to show of both"
            )


def _matched(first: Mapping[str, Side], second: Mapping[str, Side]) -> Iterator[tuple[Side, Side]]:
    common = [name for name in first if name in second]
    for name in common:
        sides = first[name], second[name]
        if sides[0].prompt != sides[1].prompt:
            raise ConfigError(
                f"the run {name!r} has other inputs in {sides[1].path} than in {sides[0].path}: roll both systems out "
                "on the same prompts"
            )
        yield sides
    if not common:
        paths = " and ".join(str(next(iter(sides.values())).path) for sides in (first, second))
        raise ConfigError(f"{paths} have no prompt in common: roll both systems out on the same prompts")


def _of_a_prompt(sides: Mapping[str, Side]) -> Iterator[tuple[Side, Side]]:
    groups: dict[str, list[Side]] = {}
    for side in sides.values():
        groups.setdefault(side.prompt, []).append(side)
    for group in groups.values():
        yield from combinations(group, 2)


def _shown(side: Side, nodes: Collection[str]) -> str:
    values = {name: value for name, value in side.run["outputs"].items() if not nodes or name in nodes}
    return _what_is_seen(values, side.path)


def _what_is_seen(values: Any, path: Path) -> str:
    """Equal for values that look the same: texts by their letters, whatever their tokens, pictures by their bytes."""
    return repr(content(map_images(lambda image: file_digest(path.parent / image), from_json(values))))


def _placed(pair: tuple[Side, Side], seed: int) -> Comparison:
    """The pair with sides by chance, which are the same in whatever order the files are given."""
    # By what they hold, not by the names of files: those may change.
    named = sorted(((_digest(side.run["id"], side.prompt, _shown(side, ())), side) for side in pair), key=itemgetter(0))
    swapped = int(_digest(str(seed), "side", *(name for name, _ in named)), 16) % 2
    (left, first), (right, second) = named[::-1] if swapped else named
    return Comparison(_digest(left, right)[:LETTERS], first, second)


def _in_turns(comparisons: Sequence[Comparison], seed: int) -> list[Comparison]:
    order = {each.id: _digest(str(seed), "order", each.id) for each in comparisons}
    turns: dict[str, int] = {}
    keys: dict[str, tuple[int, str]] = {}
    for each in sorted(comparisons, key=lambda each: order[each.id]):
        turns[each.left.prompt] = turns.get(each.left.prompt, -1) + 1
        keys[each.id] = turns[each.left.prompt], order[each.id]
    return sorted(comparisons, key=lambda each: keys[each.id])


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
