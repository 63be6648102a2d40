"""Spans a row each: as OpenTelemetry's Python SDK prints them, and as Phoenix exports them.

The SDK's `ReadableSpan.to_json`: {"name", "context": {"trace_id", "span_id"}, "parent_id", "attributes": {...}}.
Phoenix's REST API and `getSpans` have "span_kind" and "status_code" beside these, its data frames one column for each
dotted name ("context.span_id", "attributes.llm.input_messages"):
https://arize.com/docs/phoenix/sdk-api-reference/rest-api/api-reference/spans
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sysdpo_jax.traces.attributes import feedback, span_of
from sysdpo_jax.traces.spans import OtelSpan, Span, SpanError, at, moment, nested, parsed


def spans_of(row: Mapping[str, Any]) -> Iterator[Span]:
    """The span of a row, or those of a page {"data": [...]}. Raises `SpanError` for what is none."""
    if isinstance(row.get("data"), list):
        for each in row["data"]:
            yield from spans_of(each)
        return
    said = parsed(row.get("attributes")) or {}
    if not isinstance(said, Mapping):
        raise SpanError(f"its attributes are {type(said).__name__}")
    attributes = nested(said)
    given = nested({name: value for name, value in row.items() if name != "attributes"})
    attributes = attributes or at(given, "attributes") or {}
    trace, own = at(given, "context", "trace_id") or given.get("trace_id"), at(given, "context", "span_id")
    own = own or given.get("span_id")
    if not trace or not own or "name" not in given:
        raise SpanError("it lacks a trace_id, a span_id or a name")
    status = at(given, "status", "status_code") or given.get("status_code") or ""
    message = at(given, "status", "description") or given.get("status_message") or "failed"
    failed = str(message) if str(status).endswith("ERROR") else ""
    times = moment(given.get("start_time")), moment(given.get("end_time"))
    events = [(str(at(each, "name")), nested(at(each, "attributes") or {})) for each in row.get("events") or []]
    parent = given.get("parent_id") or at(given, "parent", "span_id") or None
    raw = OtelSpan(str(trace), str(own), parent and str(parent), str(given["name"]), *times, failed, attributes, events)
    span = span_of(raw, str(given.get("span_kind") or ""))
    more = tuple(feedback(given))
    yield span if not more else Span(**{**vars(span), "scores": (*span.scores, *more)})
