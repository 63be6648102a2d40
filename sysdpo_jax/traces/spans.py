"""What every format of traces is read into: spans, each a call of a model, a tool or a part of the program."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

# Kinds of OpenInference, https://arize-ai.github.io/openinference/spec/semantic_conventions.html
LLM, RETRIEVER, TOOL, RERANKER, AGENT, CHAIN = "LLM", "RETRIEVER", "TOOL", "RERANKER", "AGENT", "CHAIN"
# Those whose output is a value of the system, and the others that conventions know, which are the program's structure.
VALUES = (LLM, RETRIEVER, TOOL, RERANKER)
STRUCTURE = (AGENT, CHAIN, "EMBEDDING", "GUARDRAIL", "EVALUATOR", "PROMPT", "DECISION", "PARSER", "EVENT")
# Labels of feedback that have no number.
LABELS = {
    **dict.fromkeys(
        ("thumbs_up", "thumbs-up", "thumbs up", "up", "👍", "positive", "good", "correct", "true", "yes"), 1.0
    ),
    **dict.fromkeys(
        ("thumbs_down", "thumbs-down", "thumbs down", "down", "👎", "negative", "bad", "incorrect", "false", "no"), 0.0
    ),
}


class Score(NamedTuple):
    """Feedback. value: None for what was said in words that are no number. whole: of the whole trace."""

    name: str
    value: float | None
    whole: bool = False
    said: str = ""


@dataclass(frozen=True)
class Span:
    """One span.

    prompt: messages, or the text that a completion goes on from. answer: of an LLM, messages where it calls tools.
    documents: of a retriever.
    tokens, prompt_tokens: ids where the span has them; counts: of the prompt's and the answer's, where they are known.
    start, end: seconds, 0 where they are not known. error: why the call failed. refused: why it can be no value.
    """

    trace: str
    id: str
    parent: str | None
    kind: str
    name: str
    start: float = 0.0
    end: float = 0.0
    input: Any = None
    output: Any = None
    prompt: Any = None
    answer: str | list[dict[str, Any]] | None = None
    documents: tuple[str, ...] | None = None
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None
    prompt_tokens: tuple[int, ...] | None = None
    counts: tuple[int | None, int | None] = (None, None)
    finish: str = ""
    scores: tuple[Score, ...] = ()
    error: str = ""
    refused: str = ""


class OtelSpan(NamedTuple):
    """A span as OpenTelemetry has it. attributes: nested, see `nested`; events: (name, attributes)."""

    trace: str
    id: str
    parent: str | None
    name: str
    start: float
    end: float
    error: str
    attributes: Mapping[str, Any]
    events: Sequence[tuple[str, Mapping[str, Any]]] = ()


class SpanError(ValueError):
    """A row is no span of its format: the message says what is missing."""


def moment(value: Any) -> float:
    """A time in seconds: of ISO 8601, or of a number of seconds, milli-, micro- or nanoseconds since 1970; else 0."""
    if isinstance(value, str) and not value.strip().isdigit():
        try:
            return datetime.fromisoformat(value.strip()).timestamp()
        except ValueError:
            return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    while 1e11 < number < float("inf"):
        number /= 1e3
    return number


def parsed(value: Any) -> Any:
    """The value, or of a text that is an object or a list of JSON what it says."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings and lists."""
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from flattened(item, f"{name}.{key}" if name else str(key))


def nested(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with dotted names, or already nested, as mappings and lists: {"a.0.b": 1} is {"a": [{"b": 1}]}."""
    tree: dict[str, Any] = {}
    for name, value in flattened(attributes):
        *above, last = name.split(".")
        here: Any = tree
        for part in above:
            below = here.get(part)
            here[part] = below if isinstance(below, dict) else {}
            here = here[part]
        if not isinstance(here.get(last), dict):
            here[last] = value
    listed: dict[str, Any] = _listed(tree)
    return listed


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    made = {name: _listed(item) for name, item in value.items()}
    if made and all(name.isdigit() for name in made):
        return [made[name] for name in sorted(made, key=int)]
    return made


def at(value: Any, *path: str) -> Any:
    """What lies at a path of names in nested mappings, None where there is nothing."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def score_of(name: Any, number: Any, label: Any = None, whole: bool = False) -> list[Score]:
    """A score of a number, which may be a text, or of a label such as a thumb; none where neither says anything."""
    said = [texts(each) for each in (number, label) if each is not None and each != ""]
    value = next((found for each in said if (found := _number(each)) is not None), None)
    return [Score(str(name), value, whole, "" if value is not None else said[0])] if said else []


def _number(said: str) -> float | None:
    word = said.strip().strip('"').lower()
    if word in LABELS:
        return LABELS[word]
    try:
        return float(word) if math.isfinite(float(word)) else None
    except ValueError:
        return None


def leaves(value: Any) -> list[tuple[str, str]]:
    """(name, text) of the texts and numbers in a value that is a text or nested; names are joined by underscores."""
    found = []
    for name, leaf in flattened(parsed(value)):
        if isinstance(leaf, str) or (isinstance(leaf, int | float) and not isinstance(leaf, bool)):
            found.append((name.replace(".", "_"), str(leaf)))
    return found


def texts(value: Any) -> str:
    """A value as one text: as it is, or as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
