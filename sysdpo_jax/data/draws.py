"""One search for likely intermediate values, which SysDPO-Sampling sums over."""

import math
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.records import require_inputs
from sysdpo_jax.graph import CompoundSystem, GraphError, Known, Node
from sysdpo_jax.typing import Params, Record


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
    next ones continue with their likeliest value, or with more while no row has `number` sets. Sets that a tool
    refuses, or skips, are left out.

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
        GraphError: For a system without intermediates.
        RecordError: For a row that lacks an input, a tool that fails or leaves a row without a set.
        ValueError: For parameters that do not belong to the system or a number below 1.
    """
    system.check_params(params)
    wanted = [node.name for node in system.intermediates]
    if not wanted:
        raise GraphError("the system has no intermediate values to draw: its preferences are for DirectObjective")
    if number < 1 or not inputs:
        raise ValueError(f"draw_intermediates: number {number} and the rows of inputs {len(inputs)} must be at least 1")
    require_inputs(system, inputs)
    sets: list[list[dict[str, Any]]] = [[dict(row)] for row in inputs]
    size = len(inputs) if size is None else size
    last = max(place for place, node in enumerate(system.nodes) if node.name in wanted)
    for node in system.nodes[: last + 1]:
        rows = list(chain.from_iterable(sets))
        # Final values are not drawn, and no intermediate depends on a tool that reads one.
        if any(parent not in rows[0] for parent in node.parents) or node in system.outputs:
            continue
        if node.deterministic:
            sets = _with_tool(system, node, sets, known)
            continue
        # Numbers that do not depend on how many distinct values each row has: nothing compiles anew.
        longest = max(map(len, sets))
        filled = rows + [rows[-1]] * (size * longest - len(rows))
        columns = {name: [row[name] for row in filled] for name in node.parents}
        found = system.node_candidates(node, params, columns, math.ceil(number / longest), key)
        longer = iter([{**row, node.name: value} for value in own] for row, own in zip(rows, found, strict=False))
        # The best of each first, then the second best of each.
        sets = [_by_turns([next(longer) for _ in kept])[:number] for kept in sets]
    return [[{name: row[name] for name in wanted} for row in kept] for kept in sets]


def _with_tool(
    system: CompoundSystem, node: Node, sets: Sequence[Sequence[dict[str, Any]]], known: Known | None
) -> list[list[dict[str, Any]]]:
    """The sets with the values of a tool, which those that have one keep; without the sets that it gives none for."""
    lacking = [row for row in chain.from_iterable(sets) if node.name not in row]
    columns = {name: [row[name] for row in lacking] for name in node.parents}
    answers = iter(system.tool_values(node, columns, known) if lacking else ())
    made = []
    for place, kept in enumerate(sets):
        values = [row[node.name] if node.name in row else next(answers) for row in kept]
        stop_on_failure(values, f"row {place}")
        usable = [row | {node.name: value} for row, value in zip(kept, values, strict=True) if not failed(value)]
        if not usable:
            raise values[0].at(f"row {place}")
        made.append(usable)
    return made


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
