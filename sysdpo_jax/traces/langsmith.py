"""Runs of LangSmith, a row each, as its API and bulk exports give them; child runs may stand in their parents.

https://docs.langchain.com/langsmith/run-data-format
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sysdpo_jax.traces.messages import document_text, finish_of, ids_of, with_texts
from sysdpo_jax.traces.spans import AGENT, LLM, Score, Span, SpanError, at, moment, parsed, score_of

PARAMETERS = ("temperature", "top_p", "max_tokens")


def spans_of(row: Mapping[str, Any], trace: str = "", parent: str | None = None) -> Iterator[Span]:
    """The span of a run, and those of its child runs. Raises `SpanError` for what is none."""
    if not row.get("id") or not row.get("run_type"):
        raise SpanError("it lacks an id or a run_type")
    given, made, extra = (parsed(row.get(name)) or {} for name in ("inputs", "outputs", "extra"))
    own, kind = str(row["id"]), str(row["run_type"]).upper()
    trace = str(row.get("trace_id") or trace or own)
    above = row.get("parent_run_id") or parent
    about, asked = at(extra, "metadata") or {}, at(extra, "invocation_params") or {}
    known = {name: about.get(f"ls_{name}", asked.get(name)) for name in PARAMETERS}
    prompt_ids, ids = ids_of(made)
    usage = _usage(made)
    documents = at(made, "documents") or (made if isinstance(made, list) else None)
    span = Span(
        trace,
        own,
        str(above) if above else None,
        AGENT if about.get("ls_agent_type") == "root" else kind,
        str(row.get("name") or kind),
        moment(row.get("start_time")),
        moment(row.get("end_time")),
        given or None,
        _only(made),
        documents=tuple(map(document_text, documents)) if kind == "RETRIEVER" and documents else None,
        model=str(about.get("ls_model_name") or asked.get("model") or asked.get("model_name") or ""),
        settings={name: value for name, value in known.items() if value is not None},
        tokens=ids,
        prompt_tokens=prompt_ids,
        counts=(
            row.get("prompt_tokens") or usage.get("input_tokens") or usage.get("prompt_tokens"),
            row.get("completion_tokens") or usage.get("output_tokens") or usage.get("completion_tokens"),
        ),
        finish=finish_of(made),
        scores=tuple(_feedback(row)),
        error=str(row.get("error") or ""),
    )
    yield with_texts(span, given, made, asked.get("tools")) if kind == LLM else span
    for child in row.get("child_runs") or []:
        yield from spans_of(child, trace, own)


def _usage(made: Any) -> Mapping[str, Any]:
    """What was counted, of an answer or of the one message that LangChain generated."""
    generated = at(made, "generations")
    while isinstance(generated, list) and len(generated) == 1:
        generated = generated[0]
    message = at(generated, "message", "kwargs")
    places = [
        (made, "usage_metadata"),
        (made, "usage"),
        (message, "usage_metadata"),
        (made, "llm_output", "token_usage"),
    ]
    return next((found for value, *path in places if (found := at(value, *path))), {})


def _only(made: Any) -> Any:
    """An output that stands alone, as LangSmith wraps it, and otherwise all of them."""
    return made["output"] if isinstance(made, Mapping) and [*made] == ["output"] else made or None


def _feedback(row: Mapping[str, Any]) -> Iterator[Score]:
    for each in row.get("feedback") or []:
        yield from score_of(at(each, "key"), at(each, "score"), at(each, "value"))
    for name, about in (parsed(row.get("feedback_stats")) or {}).items():
        # Of words there is no mean, and how often each was said.
        words = [*(at(about, "values") or {})]
        yield from score_of(name, at(about, "avg"), words[0] if len(words) == 1 else ", ".join(words))
