"""Traces of Langfuse with their observations and scores, as its API and exports give them, or observations a row each.

https://langfuse.com/docs/observability/data-model and
https://langfuse.com/docs/observability/features/observation-types
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sysdpo_jax.traces.messages import document_text, finish_of, ids_of, with_texts
from sysdpo_jax.traces.spans import CHAIN, LLM, RETRIEVER, Score, Span, SpanError, at, moment, parsed, score_of

# Names of the number of tokens of a prompt and of an answer, the last of them beside the usage in older exports.
PROMPT = ("input", "input_tokens", "prompt_tokens", "promptTokens")
ANSWER = ("output", "output_tokens", "completion_tokens", "completionTokens")
KINDS = {"GENERATION": LLM, "SPAN": CHAIN}


def spans_of(row: Mapping[str, Any]) -> Iterator[Span]:
    """The spans of a trace, or that of an observation. Raises `SpanError` for what is neither."""
    if isinstance(row.get("data"), list):
        for each in row["data"]:
            yield from spans_of(each)
        return
    if not row.get("id"):
        raise SpanError("it lacks an id")
    if row.get("type"):
        yield _observation(row, str(row.get("traceId") or ""), None, ())
        return
    if not isinstance(row.get("observations"), list):
        raise SpanError("it lacks observations: export the traces with them")
    own, scores = str(row["id"]), list(row.get("scores") or [])
    root = f"trace {own}"
    times = moment(row.get("timestamp") or row.get("createdAt")), 0.0
    given, made = parsed(row.get("input")), parsed(row.get("output"))
    of_trace = tuple(score for each in scores if not at(each, "observationId") for score in _score(each, True))
    yield Span(own, root, None, CHAIN, str(row.get("name") or "trace"), *times, given, made, scores=of_trace)
    for each in row["observations"]:
        if not isinstance(each, Mapping) or not each.get("id") or not each.get("type"):
            raise SpanError("an observation lacks an id or a type")
        its = tuple(s for score in scores if at(score, "observationId") == each["id"] for s in _score(score, False))
        yield _observation(each, own, root, its)


def _observation(row: Mapping[str, Any], trace: str, root: str | None, scores: tuple[Score, ...]) -> Span:
    kind = KINDS.get(str(row["type"]).upper(), str(row["type"]).upper())
    given, made = parsed(row.get("input")), parsed(row.get("output"))
    prompt_ids, ids = ids_of(made)
    listed = at(made, "documents") or (made if isinstance(made, list) else None)
    span = Span(
        str(row.get("traceId") or trace),
        str(row["id"]),
        str(row["parentObservationId"]) if row.get("parentObservationId") else root,
        kind,
        str(row.get("name") or kind),
        moment(row.get("startTime")),
        moment(row.get("endTime")),
        given,
        made,
        documents=tuple(map(document_text, listed)) if kind == RETRIEVER and listed else None,
        model=str(row.get("model") or ""),
        settings=parsed(row.get("modelParameters")) or {},
        tokens=ids,
        prompt_tokens=prompt_ids,
        counts=(_count(row, PROMPT), _count(row, ANSWER)),
        finish=finish_of(made) or finish_of(row.get("metadata")),
        scores=(*scores, *(score for each in row.get("scores") or [] for score in _score(each, False))),
        error=str(row.get("statusMessage") or "failed") if row.get("level") == "ERROR" else "",
    )
    return with_texts(span, given, made, at(given, "tools")) if kind == LLM else span


def _count(row: Mapping[str, Any], names: Sequence[str]) -> int | None:
    usage = row.get("usage")
    if str(at(usage, "unit") or "TOKENS").upper() != "TOKENS":
        return None
    found = [at(each, name) for each in (row.get("usageDetails"), usage) for name in names]
    number = next((each for each in (*found, row.get(names[-1])) if each), None)
    return int(number) if number is not None else None


def _score(each: Mapping[str, Any], whole: bool) -> list[Score]:
    return score_of(each.get("name"), each.get("value"), each.get("stringValue"), whole)
