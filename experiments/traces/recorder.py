"""What traced programs share: their flags, and exporters of spans, as OpenTelemetry's SDK prints them and as OTLP."""

import argparse
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

# Ids that OTLP writes in hexadecimal digits, where protobuf's JSON has base64.
IDS = ("traceId", "spanId", "parentSpanId")


class SpanFile(SpanExporter):
    """A line for each span. otlp: as OTLP, a request for each span."""

    def __init__(self, path: Path, otlp: bool):
        self._file, self._otlp = path.open("w", encoding="utf-8"), otlp

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            line = json.dumps(_otlp([span])) if self._otlp else span.to_json(indent=None)
            self._file.write(f"{line}\n")
        self._file.flush()
        return SpanExportResult.SUCCESS


def provider_of(folder: Path, name: str) -> TracerProvider:
    """What makes tracers whose spans go to NAME.spans.jsonl and NAME.otlp.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of the process nothing is told: it would stand in every line.
    provider = TracerProvider(resource=Resource({}))
    for kind, otlp in (("spans", False), ("otlp", True)):
        provider.add_span_processor(SimpleSpanProcessor(SpanFile(folder / f"{name}.{kind}.jsonl", otlp)))
    return provider


def read_flags(questions: int) -> argparse.Namespace:
    """The flags of a traced program. questions: how many there are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--url", default="http://localhost:8011/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--questions", type=int, default=questions)
    return parser.parse_args()


def _otlp(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    request: dict[str, Any] = MessageToDict(encode_spans(spans))
    for span in (s for r in request["resourceSpans"] for scope in r["scopeSpans"] for s in scope["spans"]):
        span |= {name: base64.b64decode(span[name]).hex() for name in IDS if name in span}
    return request
