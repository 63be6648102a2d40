"""Spans -> trees of traces, in which every span that could be a value of the system has a role that traces share."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sysdpo_jax.traces.spans import AGENT, LLM, STRUCTURE, VALUES, Span

# Where a span stands: the names of the spans around it and its own, equal ones among siblings numbered.
Role = tuple[str, ...]
Key = tuple[str, str]
# Spans within each other, of which more are no program's.
DEEPEST = 200
# What a span of a model has from the one around it, which told of the same call.
INHERITED = ("settings", "tokens", "prompt_tokens", "finish", "model")


@dataclass
class Ledger:
    """What became of every span. fates: in words, by (trace, id); notes: what else the report should say."""

    spans: dict[Key, Span] = field(default_factory=dict)
    fates: dict[Key, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def refuse(self, spans: Iterable[Span], why: str) -> None:
        """Say why spans are no nodes, of those of which nothing is said yet."""
        for span in spans:
            self.fates.setdefault((span.trace, span.id), f"refused: {why}")

    def fate(self, key: Key) -> str:
        """What became of a span. Raises `LookupError` where nothing is said of it, which must not be."""
        if key not in self.fates:
            raise LookupError(f"the trace {key[0]} has a span {self.spans[key].name!r} ({key[1]}) that was lost")
        return self.fates[key]


class Turn(NamedTuple):
    """What a model said, and the tools that answered it."""

    model: Span
    tools: tuple[Span, ...]


@dataclass(frozen=True)
class Tree:
    """A trace. spans: by role, what a span holds before it; nodes: the roles of values, in their order.

    first: the earliest span that lies in no other. turns: of the loop whose model is the last node, if it is one.
    """

    trace: str
    spans: Mapping[Role, Span]
    nodes: tuple[Role, ...]
    first: Span
    turns: tuple[Turn, ...] = ()

    def of(self, role: Role) -> list[Span]:
        """The spans of a role: one, or of a loop's model one for each turn."""
        is_loop = bool(self.turns) and role == self.nodes[-1]
        return [turn.model for turn in self.turns] if is_loop else [self.spans[role]]

    @property
    def values(self) -> list[Span]:
        """All spans that are values."""
        tools = [span for turn in self.turns for span in turn.tools]
        return [*(span for role in self.nodes for span in self.of(role)), *tools]


def trees_of(spans: Iterable[Span], ledger: Ledger) -> list[Tree]:
    """The traces that can be read, in their order; of the others the ledger says why."""
    traces: dict[str, dict[str, Span]] = {}
    broken: dict[str, str] = {}
    for span in spans:
        known = traces.setdefault(span.trace, {})
        if span.id in known and known[span.id] != span:
            broken.setdefault(span.trace, f"its trace has two different spans with the id {span.id}")
        elif span.id in known:
            ledger.notes["spans that were there twice, and read once"] += 1
        known.setdefault(span.id, span)
        ledger.spans.setdefault((span.trace, span.id), span)
    made = []
    for trace, known in traces.items():
        why = broken.get(trace) or _cycle(known)
        tree = None if why else _tree(trace, known, ledger)
        if tree is not None:
            made.append(tree)
        else:
            ledger.refuse(known.values(), why or "its trace has no value")
    return made


def of_one_shape(trees: list[Tree], ledger: Ledger) -> list[Tree]:
    """The trees of the most frequent shape; the ledger refuses the spans of the others, with what differs."""
    shapes = Counter(map(shape_of, trees))
    if not shapes:
        return []
    shape, _ = shapes.most_common(1)[0]
    kept = [tree for tree in trees if shape_of(tree) == shape]
    for tree in trees:
        if shape_of(tree) == shape:
            continue
        more, less = shape_of(tree) - shape, shape - shape_of(tree)
        said = [f"{word} {_named(*sorted(parts)[0])}" for word, parts in (("has", more), ("lacks", less)) if parts]
        why = f"its trace has another shape than the {len(kept)} of the most frequent one (it {' and '.join(said)})"
        ledger.refuse(tree.values, why)
        ledger.notes["traces left out because of their shape"] += 1
    return kept


def shape_of(tree: Tree) -> frozenset[tuple[Role, bool]]:
    """The roles of values, and which are of models."""
    return frozenset((role, tree.spans[role].kind == LLM) for role in tree.nodes)


def _named(role: Role, is_model: bool) -> str:
    return f"{' / '.join(role)}{', a model' if is_model else ''}"


def _cycle(known: Mapping[str, Span]) -> str:
    for span in known.values():
        seen, above = {span.id}, span.parent
        while above is not None and above in known:
            if above in seen:
                return f"its trace is no tree: the span {span.id} lies within itself"
            seen.add(above)
            above = known[above].parent
        if len(seen) > DEEPEST:
            return f"the span {span.id} lies in more than {DEEPEST} others"
    return ""


def _tree(trace: str, known: Mapping[str, Span], ledger: Ledger) -> Tree | None:
    children: dict[str | None, list[Span]] = {}
    # A stable sort: spans without times stay as the file has them.
    for span in sorted(known.values(), key=lambda one: one.start):
        if span.parent is not None and span.parent not in known:
            ledger.notes["spans whose parent is not there, which begin a trace"] += 1
        children.setdefault(span.parent if span.parent in known else None, []).append(span)
    tops, values = children.get(None, []), dict[str, Span]()
    alive = {top.id: top for top in tops}
    for top in tops:
        _find_values(top, children, alive, values, ledger)
    made: dict[Role, Span] = {}
    _number(tops, (), children, alive, values, made)
    nodes = tuple(role for role, span in made.items() if span.id in values)
    if not nodes:
        return None
    return Tree(trace, made, nodes, tops[0])


def _find_values(
    span: Span, children: Mapping[str | None, list[Span]], alive: dict[str, Span], values: dict[str, Span], led: Ledger
) -> list[Span]:
    """Put the spans below that can be values into `values`, and all that did not fail into `alive`; those values."""
    key = (span.trace, span.id)
    if span.error:
        alive.pop(span.id, None)
        led.refuse([span], f"it failed ({span.error[:80]})")
        led.refuse(_below(span, children), "it lies in a span that failed")
        return []
    below: list[Span] = []
    for child in children.get(span.id, ()):
        alive[child.id] = child
        below += _find_values(child, children, alive, values, led)
    calls = [one for one in below if one.kind == LLM]
    if span.kind == LLM and len(calls) == 1:
        # Two instruments told of one call: the inner one saw what was sent.
        inner = calls[0]
        more = {name: getattr(span, name) for name in INHERITED if not getattr(inner, name)}
        values[inner.id] = alive[inner.id] = replace(inner, **more, scores=(*inner.scores, *span.scores))
        led.fates[key] = f"the same call as the span {inner.name} in it"
        return below
    if span.kind == LLM and calls:
        led.refuse([span], f"it holds {len(calls)} spans of models, which are read themselves")
        return below
    if span.refused and span.kind == LLM:
        led.refuse([span], f"it has {span.refused}")
        return below
    is_box = span.kind == AGENT and not below and span.output is not None
    if span.kind in VALUES or is_box:
        if span.kind != LLM and span.output is None and span.documents is None:
            led.refuse([span], "it has no output")
            return below
        values[span.id] = span
        return [*below, span]
    known = span.kind in STRUCTURE
    said = f"a span of the kind {span.kind}" if known else f"a span of an unknown kind ({span.kind or 'none'})"
    led.fates[key] = f"structure: {said}"
    return below


def _below(span: Span, children: Mapping[str | None, list[Span]]) -> Iterator[Span]:
    for child in children.get(span.id, ()):
        yield child
        yield from _below(child, children)


def _number(
    siblings: list[Span],
    above: Role,
    children: Mapping[str | None, list[Span]],
    alive: Mapping[str, Span],
    values: Mapping[str, Span],
    made: dict[Role, Span],
) -> None:
    """Put the spans that are or hold values into `made` by their roles, what a span holds before it."""
    names, counts = {span.name for span in siblings}, Counter[str]()
    for span in siblings:
        held = [span, *_below(span, children)]
        if span.id in alive and any(one.id in values for one in held):
            counts[span.name] += 1
            # A name that is there with a number is another one's.
            while counts[span.name] > 1 and f"{span.name}#{counts[span.name]}" in names:
                counts[span.name] += 1
            number = counts[span.name]
            role = (*above, span.name if number == 1 else f"{span.name}#{number}")
            _number(children.get(span.id, []), role, children, alive, values, made)
            made[role] = values.get(span.id, alive[span.id])
