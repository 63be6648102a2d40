"""OTLP in JSON, as the OpenTelemetry collector's file exporter writes it: a request, or a line for each.

https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/ and, for typed values,
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sysdpo_jax.traces.attributes import span_of
from sysdpo_jax.traces.spans import OtelSpan, Span, SpanError, at, moment, nested

# STATUS_CODE_ERROR, as a number and by name.
ERRORS = (2, "2", "STATUS_CODE_ERROR")


def spans_of(row: Mapping[str, Any]) -> Iterator[Span]:
    """The spans of a request. Raises `SpanError` for what is none."""
    requests = row.get("resourceSpans", row.get("batches"))
    if not isinstance(requests, list):
        raise SpanError("it lacks resourceSpans")
    for request in requests:
        scopes = at(request, "scopeSpans") or at(request, "instrumentationLibrarySpans") or []
        for scope in scopes:
            for span in at(scope, "spans") or []:
                yield span_of(_raw(span))


def _raw(span: Mapping[str, Any]) -> OtelSpan:
    trace, own = at(span, "traceId"), at(span, "spanId")
    if not trace or not own:
        raise SpanError("a span lacks traceId or spanId")
    message = at(span, "status", "message") or "failed"
    failed = str(message) if at(span, "status", "code") in ERRORS else ""
    parent = span.get("parentSpanId") or None
    times = moment(span.get("startTimeUnixNano")), moment(span.get("endTimeUnixNano"))
    events = [(str(at(each, "name")), nested(_values(at(each, "attributes")))) for each in span.get("events") or []]
    attributes = nested(_values(span.get("attributes")))
    return OtelSpan(str(trace), str(own), parent, str(span.get("name", "")), *times, failed, attributes, events)


def _values(attributes: Any) -> dict[str, Any]:
    return {str(at(each, "key")): _value(at(each, "value")) for each in attributes or []}


def _value(value: Any) -> Any:
    """What a typed value holds. Whole numbers are texts in this encoding."""
    if not isinstance(value, Mapping) or not value:
        return None
    kind, held = next(iter(value.items()))
    if kind == "intValue":
        return int(held)
    if kind == "arrayValue":
        return [_value(each) for each in at(held, "values") or []]
    if kind == "kvlistValue":
        return _values(at(held, "values"))
    return held
