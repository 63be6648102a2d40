"""What people and programs thought of traces: one number each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.traces.files import rows_of
from sysdpo_jax.traces.spans import Score, at, score_of
from sysdpo_jax.traces.trees import Ledger

# Fields of a file of scores, in the names of several programs.
TRACE, SPAN = ("trace_id", "traceId", "trace", "id", "run_id"), ("span_id", "spanId", "observationId")
# Every score of a trace: (distance from the root, the score).
Found = dict[str, list[tuple[int, Score]]]


def recorded_scores(ledger: Ledger) -> Found:
    """The scores in the traces."""
    found: Found = {}
    for span in ledger.spans.values():
        depth, above, seen = 0, span.parent, {span.id}
        while above is not None and above not in seen and (span.trace, above) in ledger.spans:
            seen.add(above)
            depth, above = depth + 1, ledger.spans[span.trace, above].parent
        found.setdefault(span.trace, []).extend((-1 if score.whole else depth, score) for score in span.scores)
        for score in span.scores:
            if score.value is None:
                ledger.notes[f"scores {score.name!r} refused, no number or thumb ({score.said[:40]!r})"] += 1
    return found


def external_scores(file: Path, ledger: Ledger) -> Found:
    """The scores of a file, which name traces or spans by their ids. Raises `ConfigError` naming the row."""
    traces = {_id(trace): trace for trace, _ in ledger.spans}
    of_span = {_id(own): trace for trace, own in ledger.spans}
    found: Found = {}
    for number, row in rows_of(file):
        result = at(row, "result") or row
        named = next((_id(row[name]) for name in TRACE if at(row, name) is not None), "")
        span = next((_id(row[name]) for name in SPAN if at(row, name) is not None), named)
        trace = traces.get(named, of_span.get(span))
        if trace is None:
            raise ConfigError(f"{file}, row {number} names no trace or span of these traces: give it a 'trace_id'")
        value = next((at(result, name) for name in ("score", "value") if at(result, name) is not None), None)
        scores = score_of(at(row, "name") or at(row, "key") or "score", value, at(result, "label"), True)
        if not scores or scores[0].value is None:
            said = f"the score {scores[0].said[:40]!r}" if scores else "no 'score'"
            raise ConfigError(f"{file}, row {number} has {said}: give a number, or thumbs_up or thumbs_down")
        found.setdefault(trace, []).extend((-1, score) for score in scores)
    return found


def _id(name: Any) -> str:
    """An id without the mark of hexadecimal digits that some programs write before it."""
    return str(name).lower().removeprefix("0x")


def chosen_scores(found: Found, name: str, traces: Sequence[str]) -> tuple[str, Mapping[str, float], int]:
    """(name, the score of each trace, the traces left out because several equally near to the root differ).

    The nearest to the root is a trace's. Raises `ConfigError` where there is none, or several names and none is chosen.
    """
    scored = [score for rows in found.values() for _, score in rows]
    names: dict[str, Any] = {score.name: None for score in scored if score.value is not None}
    if scored and not names:
        raise ConfigError(
            f"no score of the traces is a number or a thumb: {scored[0].name!r} says {scored[0].said[:40]!r}; give "
            "--scores FILE with a number for each trace"
        )
    if not names:
        raise ConfigError("the traces have no score: annotate them, or give --scores FILE with a score for each trace")
    if name and name not in names:
        raise ConfigError(f"--score {name!r} is none of the traces' scores: {meant(name, names)}")
    if not name and len(names) > 1:
        raise ConfigError(f"the traces have several scores ({', '.join(names)}): choose one with --score NAME")
    name = name or next(iter(names))
    scores, unclear = {}, 0
    for trace in traces:
        rows = [(depth, score.value) for depth, score in found.get(trace, ()) if score.name == name]
        known = [(depth, value) for depth, value in rows if value is not None]
        nearest = {value for depth, value in known if depth == min(depth for depth, _ in known)}
        if len(nearest) == 1:
            scores[trace] = nearest.pop()
        unclear += len(nearest) > 1
    return name, scores, unclear
