"""Spans of OpenTelemetry whose attributes follow OpenInference, or OpenTelemetry's own conventions for generative AI.

OpenInference: https://arize-ai.github.io/openinference/spec/semantic_conventions.html
gen_ai.*: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/, with the names that it had before
(gen_ai.prompt.0.content) and those that OpenLLMetry adds (traceloop.*).
"""

from collections.abc import Mapping
from typing import Any

from sysdpo_jax.traces.messages import document_text, finish_of, ids_of, with_texts
from sysdpo_jax.traces.spans import AGENT, CHAIN, LLM, RETRIEVER, TOOL, OtelSpan, Score, Span, at, parsed, score_of

OPERATIONS = {
    **dict.fromkeys(("chat", "text_completion", "generate_content", "completion"), LLM),
    **dict.fromkeys(("invoke_agent", "create_agent"), AGENT),
    **{"execute_tool": TOOL, "retrieval": RETRIEVER, "embeddings": "EMBEDDING", "invoke_workflow": CHAIN},
}
TRACELOOP = {"workflow": CHAIN, "task": CHAIN, "agent": AGENT, "tool": TOOL}


def span_of(raw: OtelSpan, kind: str = "") -> Span:
    """The span. kind: what its row says beside the attributes."""
    given = raw.attributes
    kind = str(at(given, "openinference", "span", "kind") or kind).upper()
    if kind and kind != "UNKNOWN":
        return _open_inference(raw, kind)
    operation, loop = at(given, "gen_ai", "operation", "name"), at(given, "traceloop", "span", "kind")
    if at(given, "llm", "request", "type") in OPERATIONS:
        operation = at(given, "llm", "request", "type")
    if operation or loop or at(given, "gen_ai"):
        asked = at(given, "gen_ai", "request", "model") is not None
        return _gen_ai(raw, OPERATIONS.get(operation) or TRACELOOP.get(loop) or (LLM if asked else CHAIN))
    return _plain(raw, kind, None, None)


def _plain(raw: OtelSpan, kind: str, given: Any, made: Any, **more: Any) -> Span:
    ids = raw.trace, raw.id, raw.parent
    return Span(*ids, kind, raw.name, raw.start, raw.end, given, made, error=raw.error, **more)


def _open_inference(raw: OtelSpan, kind: str) -> Span:
    given = raw.attributes
    asked, made = (at(given, side, "value") for side in ("input", "output"))
    documents = at(given, "retrieval", "documents") or at(given, "reranker", "output_documents")
    llm = at(given, "llm") or {}
    prompt_ids, ids = ids_of(made)
    span = _plain(
        raw,
        kind,
        parsed(asked),
        parsed(made),
        documents=None if documents is None else tuple(document_text(at(each, "document")) for each in documents),
        model=str(llm.get("model_name") or ""),
        settings=_mapping(llm.get("invocation_parameters")),
        tokens=ids,
        prompt_tokens=prompt_ids,
        counts=(_count(at(llm, "token_count", "prompt")), _count(at(llm, "token_count", "completion"))),
        finish=finish_of(llm) or _ending(llm) or finish_of(made),
        scores=tuple(feedback(given)),
    )
    if kind != LLM:
        return span
    prompts = [at(each, "prompt", "text") for each in llm.get("prompts") or []]
    prompt = [_message(each) for each in llm.get("input_messages") or []] or prompts or asked
    answers = [_message(each) for each in llm.get("output_messages") or []]
    choices = [at(each, "completion", "text") for each in llm.get("choices") or []]
    tools = [parsed(at(each, "tool", "json_schema")) for each in llm.get("tools") or []]
    return with_texts(span, prompt, answers or choices or made, tools)


def _gen_ai(raw: OtelSpan, kind: str) -> Span:
    given: dict[str, Any] = dict(raw.attributes)
    for name, more in raw.events:
        # What is large may stand in an event instead.
        if name == "gen_ai.client.inference.operation.details":
            given = {**given, "gen_ai": {**(at(given, "gen_ai") or {}), **(at(more, "gen_ai") or {})}}
    own, loop = at(given, "gen_ai") or {}, at(given, "traceloop", "entity") or {}
    system = parsed(own.get("system_instructions")) or []
    asked = parsed(at(own, "input", "messages")) or own.get("prompt") or []
    made = parsed(at(own, "output", "messages")) or own.get("completion") or []
    call = at(own, "tool", "call") or {}
    outer = parsed(call.get("arguments") or at(own, "retrieval", "query", "text") or loop.get("input") or asked or None)
    inner = parsed(call.get("result") or loop.get("output") or made or None)
    documents = parsed(at(own, "retrieval", "documents"))
    usage = own.get("usage") or {}
    span = _plain(
        raw,
        kind,
        at(outer, "inputs") or outer,
        at(inner, "outputs") or inner,
        documents=tuple(map(document_text, documents)) if isinstance(documents, list) else None,
        model=str(at(own, "request", "model") or at(own, "response", "model") or ""),
        settings={name: value for name, value in (own.get("request") or {}).items() if name != "model"},
        counts=(
            _count(usage.get("input_tokens", usage.get("prompt_tokens"))),
            _count(usage.get("output_tokens", usage.get("completion_tokens"))),
        ),
        finish=finish_of(own.get("response")) or finish_of(made) or finish_of(at(given, "llm", "response")),
        scores=tuple(_evaluations(raw)),
    )
    if kind != LLM:
        return span
    first = [{"role": "system", "parts": system}] if system and isinstance(asked, list) else []
    return with_texts(span, [*first, *asked] if isinstance(asked, list) else asked, made)


def feedback(given: Mapping[str, Any]) -> list[Score]:
    """The scores of OpenInference's attributes: annotations and evaluations, of the span or of the whole trace."""
    found = []
    for whole in (False, True):
        here = at(given, "trace") if whole else given
        for many, one in (("annotations", "annotation"), ("evaluations", "evaluation")):
            listed = at(here, many)
            for each in listed if isinstance(listed, list) else []:
                entry = at(each, one) or each
                # Phoenix's rows hold the score below "result".
                result = at(entry, "result") or entry
                found += score_of(at(entry, "name"), at(result, "score"), at(result, "label"), whole)
    return found


def _evaluations(raw: OtelSpan) -> list[Score]:
    found = feedback(raw.attributes)
    for name, more in raw.events:
        if name == "gen_ai.evaluation.result":
            own = at(more, "gen_ai", "evaluation") or {}
            found += score_of(own.get("name"), at(own, "score", "value"), at(own, "score", "label"))
    return found


def _message(entry: Any) -> dict[str, Any]:
    own = at(entry, "message") or {}
    parts = [at(each, "message_content") or each for each in own.get("contents") or []]
    made = {"role": own.get("role") or "", "content": parts or own.get("content")}
    made["tool_calls"] = [at(each, "tool_call") or each for each in own.get("tool_calls") or []]
    return made | {key: own[key] for key in ("tool_call_id", "name") if own.get(key)}


def _mapping(value: Any) -> Mapping[str, Any]:
    value = parsed(value)
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _ending(llm: Mapping[str, Any]) -> str:
    """Why the first answer ended, where the message itself says it."""
    said = next(iter(llm.get("output_messages") or []), None)
    return finish_of(at(said, "message") or said)
