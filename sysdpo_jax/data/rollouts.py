"""What a system samples: runs, preference pairs of scored ones, and likely intermediates for SysDPO-Sampling."""

import logging
import math
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from sysdpo_jax.components.tool import NotCalledError, ToolError
from sysdpo_jax.data.records import PreferenceRecord, require_inputs, require_searchable
from sysdpo_jax.graph import CompoundSystem, GraphError, Known, Node
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.values import content

logger = logging.getLogger(__name__)

Pairs = Literal["best_worst", "all"]
Ties = Literal["drop", "keep"]
Scores = Float[np.ndarray, "runs"]


class RolloutStopped(ToolError):
    """A tool stopped a rollout. records: the runs that were complete by then, as `rollout` returns them."""

    records: Sequence[dict[str, Any]] = ()


def rollout(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    key: PRNGKeyArray,
    samples: int = 1,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda done: None,
    shard: tuple[int, int] = (0, 1),
    skipped: Callable[[int, ToolError], None] = lambda place, error: logger.warning("left out: %s", error),
) -> list[dict[str, Any]]:
    """Run the whole system several times for every input.

    Components draw batches of the same size, so nothing recompiles; tools are called for the runs alone, once for each.
    All runs are in memory until the last one is made, and Ctrl-C loses them: `run_batches` gives them as they come.

    Args:
        system: The graph.
        params: `{params_key: tree}`.
        inputs: `{name: value}` each.
        key: Of the draws.
        samples: Runs of each input.
        batch_size: Runs at a time.
        progress: Is told how many runs each batch made.
        shard: (index, count) makes the batches index, index + count, ... alone, whose runs are the same as among all.
        skipped: Is told the place, `samples` * input + sample, of a run that is left out, because a tool with
            on_error="skip" failed, and why. It is logged by default.

    Returns:
        `{name: value}` of inputs and all nodes; runs of one input are adjacent.

    Raises:
        RolloutStopped: A tool with on_error="stop" failed: names the prompt and the sample, counted from 1, and has the
            runs that are complete. It is a `ToolError`.
    """
    records: list[dict[str, Any]] = []
    for batch in run_batches(system, params, inputs, key, samples, batch_size, shard):
        for place, run in batch:
            if not isinstance(run, ToolError):
                records.append(run)
                continue
            named = run.at(f"prompt {place // samples + 1}, sample {place % samples + 1}")
            if not run.skip:
                stopped = RolloutStopped(str(named), named.skip, named.refused)
                stopped.records = records
                raise stopped from named.__cause__
            skipped(place, named)
        progress(len(batch))
    return records


def run_batches(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    key: PRNGKeyArray,
    samples: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    made: Container[int] = (),
) -> Iterator[list[tuple[int, Any]]]:
    """`rollout` a batch at a time: (place, run), or (place, `ToolError`) for a run that its tool leaves out.

    made: places that are not made again; the other ones become what they would be among all.
    Where a tool stops the whole, the runs of its batch that are complete come first, and its error comes last of all.
    """
    index, count = shard
    for number, start in list(enumerate(range(0, len(inputs) * samples, batch_size)))[index::count]:
        places = range(start, min(start + batch_size, len(inputs) * samples))
        rows = [None if place in made else inputs[place // samples] for place in places]
        filled = rows + [None] * (batch_size - len(rows))
        runs = system.attempt(params, filled, jax.random.fold_in(key, number))
        found = [(place, run) for place, run in zip(places, runs, strict=False) if run is not None]
        failures = [(place, run) for place, run in found if _stops(run) and not isinstance(run, NotCalledError)]
        yield [(place, run) for place, run in found if not _stops(run)] + failures[:1]
        if failures:
            return


def _stops(run: Any) -> bool:
    return isinstance(run, ToolError) and not run.skip


def make_pairs(
    system: CompoundSystem,
    records: Sequence[Mapping[str, Any]],
    scores: Scores,
    group: int,
    min_margin: float = 0.0,
    pairs: Pairs = "best_worst",
    ties: Ties = "drop",
) -> list[PreferenceRecord]:
    """Preferences within each group of adjacent runs of equal inputs, by their scores.

    Args:
        system: The graph.
        records: As `rollout` returns them.
        scores: One a run, higher is better.
        group: Runs in a group at most, `rollout`'s samples for all of an input; a tool may have left out some of them,
            and a run alone makes no pair.
        min_margin: Smallest difference that is kept.
        pairs: The best against the worst of a group, or all two.
        ties: Whether equal scores make a pair. A kept one has no right order: it takes that of the records, which is a
            fair coin as long as they are samples of one system, and is for losses with label smoothing.

    Returns:
        The preferences, with intermediates.

    Raises:
        ValueError: For scores that are not finite or not one a run, a group below 1, or ties kept below a margin.
    """
    if len(records) != len(scores):
        raise ValueError(f"there are {len(records)} runs and {len(scores)} scores: give a score for each run")
    if group < 1:
        raise ValueError(f"group {group} must be at least 1 run")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of run {int(np.argmin(np.isfinite(scores)))} is not finite: fix or drop the run")
    made = []
    for start, end in _groups([content([record[name] for name in system.inputs]) for record in records], group):
        inputs = {name: records[start][name] for name in system.inputs}
        for places in preferred(scores[start:end], pairs, min_margin, ties):
            sides = (system.values(records[start + place]) for place in places)
            made.append(PreferenceRecord(inputs, *sides))
    return made


def _groups(inputs: Sequence[Hashable], size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the longest groups of adjacent equal inputs with `size` of them at most."""
    start = 0
    for end in range(1, len(inputs) + 1):
        if end == len(inputs) or inputs[end] != inputs[start] or end - start == size:
            yield start, end
            start = end


def preferred(scores: Scores, pairs: Pairs, min_margin: float, ties: Ties = "drop") -> list[tuple[int, int]]:
    """(better, worse) places of finite scores that differ by at least min_margin; of equal ones if ties are kept.

    "best_worst" gives the first of the highest against the first of the lowest, where all are equal the first place
    against the last; "all" gives every two. Ties are in the order of their places.
    Raises `ValueError` for a margin that ties are to be kept below.
    """
    if ties == "keep" and min_margin > 0:
        raise ValueError(f"min_margin {min_margin:g} drops the ties that ties='keep' asks for: choose one of them")
    order = np.argsort(-scores, kind="stable").tolist()
    if pairs == "all":
        candidates = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    else:
        lowest = order[-1] if scores.min() == scores.max() else int(np.argmin(scores))
        candidates = [(order[0], lowest)]
    margins = ((pair, scores[pair[0]] - scores[pair[1]]) for pair in candidates if pair[0] != pair[1])
    return [pair for pair, margin in margins if margin >= min_margin and (margin > 0 or ties == "keep")]


def draw_intermediates(
    system: CompoundSystem,
    params: Params,
    inputs: Sequence[Record],
    number: int,
    key: PRNGKeyArray,
    size: int | None = None,
    known: Known | None = None,
) -> list[list[dict[str, Any]]]:
    """Search for likely sets of intermediate values.

    The first node spreads into `number` candidates (a language model's by its diverse beam search), each of which the
    next ones continue with their likeliest value, or with more while no row in which they run has `number` sets. Sets
    that a tool refuses, or skips, are left out.

    Args:
        system: The graph.
        params: `{params_key: tree}`.
        inputs: `{name: value}` each; a row may hold values of `system.given` too.
        number: Size of a row's set of sets.
        key: Of the draws.
        size: Rows that components draw at a time, the others of which are thrown away; as many as inputs by default.
        known: See `CompoundSystem.complete`; by default a tool is called for each set.

    Returns:
        From 1 to `number` distinct sets `{intermediate node: value}` for every row.

    Raises:
        GraphError: For a system without intermediates, or with a loop.
        RecordError: For a row that lacks an input, a tool that fails or leaves a row without a set.
        ValueError: For parameters that do not belong to the system or a number below 1.
    """
    system.check_params(params)
    require_searchable(system)
    wanted = [node.name for node in system.intermediates]
    if not wanted:
        raise GraphError("the system has no intermediate values to draw: its preferences are for DirectObjective")
    if number < 1 or not inputs:
        raise ValueError(f"draw_intermediates: number {number} and the rows of inputs {len(inputs)} must be at least 1")
    require_inputs(system, inputs)
    sets: list[list[dict[str, Any]]] = [[dict(row)] for row in inputs]
    size = len(inputs) if size is None else size
    last = max(place for place, node in enumerate(system.nodes) if node.name in wanted)
    undrawn = {node.name for node in system.outputs}
    for node in system.nodes[: last + 1]:
        # Final values are not drawn, and no intermediate depends on a tool that reads one.
        if node.name in undrawn or not undrawn.isdisjoint(node.parents):
            undrawn.add(node.name)
            continue
        sets = [_decided(system, node, kept, place) for place, kept in enumerate(sets)]
        if node.deterministic:
            sets = _with_tool(system, node, sets, known)
            continue
        running = [[row for row in kept if system.flow.runs(node.name, row)] for kept in sets]
        rows = list(chain.from_iterable(running))
        if not rows:
            continue
        # Numbers that do not depend on how many distinct values each row has: nothing compiles anew. Rows in which the
        # node never runs may have all their sets already.
        longest = max(len(kept) for kept, own in zip(sets, running, strict=True) if own)
        filled = rows + [rows[-1]] * (size * longest - len(rows))
        columns = {name: [row[name] for row in filled] for name in node.parents}
        found = iter(system.node_candidates(node, params, columns, math.ceil(number / longest), key))
        longer = [
            [
                [{**row, node.name: x} for x in next(found)] if system.flow.runs(node.name, row) else [row]
                for row in kept
            ]
            for kept in sets
        ]
        # The best of each first, then the second best of each.
        sets = [_by_turns(own)[:number] for own in longer]
    return [[{name: row[name] for name in wanted if name in row} for row in kept] for kept in sets]


def _decided(system: CompoundSystem, node: Node, kept: list[dict[str, Any]], place: int) -> list[dict[str, Any]]:
    """The sets of a row without those in which a switch has no case for what chooses."""
    if node.name not in system.flow.conditional:
        return kept
    found, refused = [], []
    for row in kept:
        try:
            system.flow.runs(node.name, row)
            found.append(row)
        except ToolError as error:
            refused.append(error)
    if not found:
        raise refused[0].at(f"row {place}")
    return found


def _with_tool(
    system: CompoundSystem, node: Node, sets: Sequence[Sequence[dict[str, Any]]], known: Known | None
) -> list[list[dict[str, Any]]]:
    """The sets with the values of a tool, which those that have one keep; without the sets that it gives none for."""

    def lacks(row: dict[str, Any]) -> bool:
        return node.name not in row and system.flow.runs(node.name, row)

    lacking = list(filter(lacks, chain.from_iterable(sets)))
    answers = iter(system.given_values(node, lacking, known) if lacking else ())
    made = []
    for place, kept in enumerate(sets):
        outcomes: list[Any] = [_with(row, node.name, next(answers)) if lacks(row) else row for row in kept]
        stop_on_failure(outcomes, f"row {place}")
        usable = [row for row in outcomes if not failed(row)]
        if not usable:
            raise next(row for row in outcomes if isinstance(row, ToolError)).at(f"row {place}")
        made.append(usable)
    return made


def _with(row: dict[str, Any], name: str, value: Any) -> Any:
    """The row with a value, or the `ToolError` in its place."""
    return value if failed(value) else row | {name: value}


def failed(value: Any) -> bool:
    """Whether it stands for a call that gave no value."""
    return isinstance(value, ToolError)


def stop_on_failure(values: Sequence[Any], place: str) -> None:
    """Raise a `ToolError` among the values that is neither a refusal nor to be skipped."""
    failures = [value for value in values if isinstance(value, ToolError) and not (value.skip or value.refused)]
    for failure in failures:
        raise failure.at(place)


def _by_turns(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]
