"""Calls of a DSPy program as its own objects tell them, and the history of a language model.

A line is a call of the program:
{"inputs": {...}, "outputs": {...}, "trace": [{"predictor", "inputs", "outputs"}], "history": [...], "scores": {...}},
where "trace" is `dspy.settings.trace` by the predictors' names and "history" the entries of `LM.history` in that call;
`experiments/traces/dspy_program.py` writes it. An entry of `LM.history` may also stand alone, as a call of one model.
https://dspy.ai/api/models/LM/
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sysdpo_jax.traces.messages import answer_of, finish_of, ids_of, with_texts
from sysdpo_jax.traces.spans import CHAIN, LLM, TOOL, Span, SpanError, leaves, moment, parsed, score_of, texts

PROGRAM = "program"


def spans_of(row: Mapping[str, Any], number: int = 0) -> Iterator[Span]:
    """The spans of a call. number: of its row, which names it where it has no id. Raises `SpanError`."""
    trace = str(row.get("id") or row.get("uuid") or f"call {number}")
    scores = tuple(s for name, value in (row.get("scores") or {}).items() for s in score_of(name, value, whole=True))
    if "outputs" in row and ("messages" in row or "prompt" in row) and "history" not in row:
        yield replace(_call(row, trace, None, 0), scores=scores)
        return
    if not isinstance(row.get("history"), list) or not isinstance(row.get("inputs"), Mapping):
        raise SpanError("it is neither a call with 'inputs' and 'history' nor an entry of a history")
    yield Span(trace, PROGRAM, None, CHAIN, PROGRAM, input=row["inputs"], output=row.get("outputs"), scores=scores)
    steps, place = list(row.get("trace") or []), 1
    known = {text for _, text in leaves(row["inputs"])}
    for entry in row["history"]:
        # What a predictor parsed stands in what its model said; a call of which nothing was kept is one that failed.
        step = steps[0] if steps and _said(entry, steps[0]) else None
        if step is None:
            failed = "no predictor took its answer" if "trace" in row else ""
            yield replace(_call(entry, trace, PROGRAM, place), error=failed)
            place += 1
            continue
        steps.pop(0)
        for name, value in step["inputs"].items():
            listed = tuple(map(str, value)) if isinstance(value, list) else None
            if not {text for _, text in leaves(value)} <= known:
                # The program made it between its predictors.
                span = Span(trace, f"value {place}", PROGRAM, TOOL, name, place, place, None, texts(value))
                yield replace(span, documents=listed, input=[*known])
                place += 1
                known |= {text for _, text in leaves(value)}
        above = f"predictor {place}"
        about = (trace, above, PROGRAM, CHAIN, str(step["predictor"]), place, place)
        yield Span(*about, input=step["inputs"], output=step["outputs"])
        yield _call(entry, trace, above, place)
        known |= {text for _, text in leaves(step["outputs"])}
        place += 1
    if steps:
        raise SpanError(f"its history lacks the call of the predictor {steps[0]['predictor']!r}")


def _call(entry: Mapping[str, Any], trace: str, parent: str | None, place: int) -> Span:
    usage, prompt = entry.get("usage") or {}, entry.get("messages") or entry.get("prompt")
    response = parsed(entry.get("response"))
    prompt_ids, ids = ids_of(response)
    # `json.dumps(..., default=str)` writes an object as its fields in words.
    told = re.search(r"finish_reason='(\w+)'", response) if isinstance(response, str) else None
    span = Span(
        trace,
        str(entry.get("uuid") or f"call {place}"),
        parent,
        LLM,
        "LM",
        place or moment(entry.get("timestamp")),
        place or moment(entry.get("timestamp")),
        model=str(entry.get("model") or ""),
        settings=entry.get("kwargs") or {},
        tokens=ids,
        prompt_tokens=prompt_ids,
        counts=(usage.get("prompt_tokens"), usage.get("completion_tokens")),
        finish=told[1] if told is not None else finish_of(response),
    )
    return with_texts(span, prompt, entry.get("outputs"))


def _said(entry: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    try:
        answer = answer_of(entry.get("outputs"))
    except ValueError:
        return False
    return all(text.strip() in texts(answer) for _, text in leaves(step["outputs"]))
