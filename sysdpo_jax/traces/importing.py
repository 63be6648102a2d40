"""From files of traces to a proposed system, its runs and its scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.traces.choices import Choice, Flags, choose
from sysdpo_jax.traces.files import Format, read_spans
from sysdpo_jax.traces.graph import TOLD, NodeProposal, Proposal, propose
from sysdpo_jax.traces.loops import with_loops
from sysdpo_jax.traces.scores import chosen_scores, external_scores, recorded_scores
from sysdpo_jax.traces.spans import LLM, Span
from sysdpo_jax.traces.tokens import Tokens, tokenizer_of, with_tokens
from sysdpo_jax.traces.trees import Ledger, of_one_shape, trees_of
from sysdpo_jax.values import to_json


@dataclass(frozen=True)
class Imported:
    """What traces gave.

    inputs, nodes: of the system; spans, choices, tokens: of its models' nodes. runs and scores: lines as `sysdpo
    rollout` and `sysdpo score` write them. score: its name.
    """

    ledger: Ledger
    inputs: tuple[str, ...]
    nodes: tuple[NodeProposal, ...]
    spans: Mapping[str, Sequence[Span]]
    choices: Mapping[str, Choice]
    tokens: Mapping[str, Tokens]
    runs: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    notes: list[str]


def import_traces(
    path: Path, kind: Format, flags: Flags, score: str, scores: Path | None, ask: Callable[[str], str] | None
) -> Imported:
    """Read traces, and propose the system that made them.

    Raises:
        ConfigError: For files that cannot be read, traces of which none has a value, choices that do not fit, and
            scores that are not there.
    """
    ledger = Ledger()
    trees = of_one_shape(with_loops(trees_of(read_spans(path, kind), ledger)), ledger)
    if not trees:
        reasons = sorted({fate for fate in ledger.fates.values() if fate.startswith("refused")})
        said = reasons[0] if reasons else "no span is of a model, a retriever or a tool"
        raise ConfigError(f"{path} has no trace that can be used: {said}")
    whole = propose(trees, frozenset())
    # Names do not depend on what is trained.
    single = [each for node in whole.nodes for each in (node.body or (node,))]
    roles = {node.name: node.role for node in single if node.role is not None}
    spans = {name: [span for tree in trees for span in tree.of(role)] for name, role in roles.items()}
    models = {name: its[0].model for name, its in spans.items() if its[0].kind == LLM}
    choices = choose(models, [name for name in roles if name not in models], flags, ask)
    recorded = frozenset(role for name, role in roles.items() if name in choices and choices[name].how == "tool")
    proposal = propose(trees, recorded) if recorded else whole
    tokens = _tokens(choices, spans)
    nodes = tuple(_with_tokens(node, tokens) for node in proposal.nodes)
    for name in roles:
        how = choices[name].how if name in choices else "tool"
        fate = {"train": "trained", "frozen": "frozen", "tool": "recorded values"}[how]
        for span in spans[name]:
            ledger.fates[span.trace, span.id] = f"mapped to the node {name} ({fate})"
    for span in (span for tree in trees for turn in tree.turns for span in turn.tools):
        ledger.fates[span.trace, span.id] = f"mapped to the node {TOLD} (recorded values)"
    found = external_scores(scores, ledger) if scores is not None else recorded_scores(ledger)
    called, values, unclear = chosen_scores(found, score, [tree.trace for tree in trees])
    notes = [
        f"{len({trace for trace, _ in ledger.spans})} traces, {len(trees)} of them used",
        f"the score {called!r}: of {len(values)} of these traces"
        + (f", {unclear} have several that differ" if unclear else ""),
        *(f"{node.name}: {node.why}" for node in nodes if node.why),
    ]
    turns = [*accumulate((len(tree.turns) for tree in trees), initial=0)]
    runs = [_run(tree.trace, proposal, nodes, row, turns[row : row + 2]) for row, tree in enumerate(trees)]
    lost = {spans[name][row].trace for name, its in tokens.items() for row in its.lost}
    lines = [_line(tree.trace, values.get(tree.trace), called, tree.trace in lost) for tree in trees]
    given = {name: spans[name] for name in models}
    return Imported(ledger, tuple(proposal.inputs), nodes, given, choices, tokens, runs, lines, notes)


def _with_tokens(node: NodeProposal, tokens: Mapping[str, Tokens]) -> NodeProposal:
    has = node.role is not None and node.name in tokens
    body = tuple(_with_tokens(each, tokens) for each in node.body)
    return replace(node, values=tokens[node.name].values if has else node.values, body=body)


def _tokens(choices: Mapping[str, Choice], spans: Mapping[str, Sequence[Span]]) -> dict[str, Tokens]:
    """Of each model that is computed here; equal checkpoints are read once."""
    tokenizers: dict[str, Any] = {}
    made = {}
    for name, choice in choices.items():
        if choice.how != "tool":
            if choice.checkpoint not in tokenizers:
                tokenizers[choice.checkpoint] = tokenizer_of(choice.checkpoint, name)
            made[name] = with_tokens(tokenizers[choice.checkpoint], name, spans[name])
    return made


def _line(trace: str, value: float | None, called: str, lost: bool) -> dict[str, Any]:
    """A run's score, or why it has none and is in no pair."""
    if lost:
        return {"id": trace, "error": "an answer in it was cut, and its tokenizer does not write that text"}
    if value is None:
        return {"id": trace, "error": f"the trace has no one score {called!r}"}
    return {"id": trace, "score": value}


def _run(
    trace: str, proposal: Proposal, nodes: Sequence[NodeProposal], row: int, turns: Sequence[int]
) -> dict[str, Any]:
    """A run. turns: where those of this trace begin and end among the values in a loop."""
    inputs = {name: column[row] for name, column in proposal.inputs.items()}

    def value(node: NodeProposal) -> Any:
        if node.body:
            return [{each.name: each.values[turn] for each in node.body} for turn in range(*turns)]
        return node.values[row]

    return {"id": trace, "inputs": inputs, "outputs": {node.name: to_json(value(node)) for node in nodes}}
