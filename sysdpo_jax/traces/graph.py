"""Traces of one shape -> the system that made them, and its runs."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.traces.flow import Template, Variable, contents_of, find_template, slots
from sysdpo_jax.traces.loops import told
from sysdpo_jax.traces.messages import output_text
from sysdpo_jax.traces.spans import LLM, Span, leaves, texts
from sysdpo_jax.traces.trees import Role, Tree

# Tools that stand in the proposed system.
RECORDED, STRIPPED = "sysdpo_jax.traces.tools:recorded", "sysdpo_jax.traces.tools:stripped"
# The node of a loop that has what tools answered.
TOLD = "told"
# What LangChain calls steps that have no name, beside those around them that do.
WRAPPER = "Runnable"
# What a request is called where the traces have no name for it.
REQUEST = "request"


@dataclass(frozen=True)
class NodeProposal:
    """A node. values: one a trace; role: of its spans, None for one that no span is; template: of a language model's
    prompt, None where its only parent is the prompt; tool: the function of a tool; why: said of it in the report.

    body: of a loop, whose own values are those of its body, one a turn, in as many turns at most.
    """

    name: str
    role: Role | None
    parents: tuple[str, ...]
    values: tuple[Any, ...]
    template: Template | None = None
    tool: str | None = None
    why: str = ""
    body: tuple["NodeProposal", ...] = ()
    turns: int = 0


@dataclass(frozen=True)
class Proposal:
    """inputs: values by name, one a trace."""

    inputs: dict[str, list[Any]]
    nodes: tuple[NodeProposal, ...]


def names_of(trees: Sequence[Tree], inputs: Iterable[str] = ()) -> dict[Role, str]:
    """A short name for each role of a value: the innermost name that no other one's path has, and a person gave."""
    roles, taken, made = trees[0].nodes, {*inputs, TOLD}, dict[Role, str]()
    for role in roles:
        others = {part for other in roles if other != role for part in other}
        own = [part for part in reversed(role) if part not in others]
        part = next((part for part in own if not part.startswith(WRAPPER)), own[0] if own else role[-1])
        made[role] = _free(_slug(part) or "node", taken)
        taken.add(made[role])
    return made


def propose(trees: Sequence[Tree], recorded: frozenset[Role]) -> Proposal:
    """The system of traces of one shape.

    recorded: the roles of models whose values are the record's alone. Raises `ConfigError` for traces of no value.
    """
    inputs = _read(_inputs(trees), trees)
    names = names_of(trees, inputs)
    variables = [Variable(name, [texts(value) for value in column]) for name, column in inputs.items()]
    nodes: list[NodeProposal] = []
    for role in trees[0].nodes:
        spans, name = [tree.spans[role] for tree in trees], names[role]
        if trees[0].turns and role == trees[0].nodes[-1]:
            nodes.append(_loop(name, role, trees, variables, names, role in recorded))
            break
        if spans[0].kind == LLM:
            made = _model(name, role, spans, trees, variables, nodes, names, role in recorded)
            variable = Variable(name, [texts(value) for value in made[-1].values])
        else:
            made = [_tool(name, role, spans, trees, variables, names)]
            listed = [span.documents for span in spans]
            documents = [one for one in listed if one is not None]
            shown = len(documents) == len(spans)
            variable = Variable(name, None if shown else list(made[0].values), documents if shown else None)
        nodes += made
        variables.append(variable)
    named = {variable.name: variable for variable in variables}
    final = tuple(_shown(node, named) for node in nodes)
    used = {parent for node in final for each in (node, *node.body) for parent in each.parents}
    return Proposal({name: column for name, column in inputs.items() if name in used}, final)


def _shown(node: NodeProposal, variables: dict[str, Variable]) -> NodeProposal:
    """The node with its documents as a prompt has them."""
    variable = variables.get(node.name)
    if variable is None or variable.documents is None:
        return node
    if variable.texts is None:
        return replace(node, values=tuple("\n".join(each) for each in variable.documents))
    return replace(node, values=tuple(variable.texts), why="its value is its documents as a prompt has them")


def _inputs(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """What the requests say, by name: texts of the root's input, or the first prompt where it has none.

    What all requests have in common is no input if anything differs: it is how the program was set.
    """
    fields: list[dict[str, Any]] = []
    for tree in trees:
        top = _asked(tree)
        found: dict[str, str] = {}
        for name, text in () if top.kind == LLM else leaves(top.input):
            # Of a list, as of messages, no name says more than that it is the request.
            found[_free(REQUEST if re.search(r"(^|_)\d+(_|$)", name) else _slug(name) or REQUEST, found)] = text
        fields.append({name: text for name, text in found.items() if text.strip()})
    common = [name for name in fields[0] if all(name in row for row in fields)]
    columns = {name: [row[name] for row in fields] for name in common}
    varied = {name: column for name, column in columns.items() if len(set(column)) > 1}
    if columns:
        kept = varied or columns
        # The one that is left of several needs no number.
        alone = len(kept) == 1 and next(iter(kept)).startswith(f"{REQUEST}_")
        return {REQUEST: next(iter(kept.values()))} if alone else kept
    firsts = [tree.spans[tree.nodes[0]] for tree in trees]
    asked = [span.prompt if span.kind == LLM else texts(span.input) for span in firsts]
    if any(not one or one == "null" for one in asked):
        raise ConfigError(f"trace {trees[0].trace}: neither its root nor its first span says what was asked: record it")
    return {REQUEST: asked}


def _read(inputs: dict[str, list[Any]], trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """The inputs that a value's span is given in every trace, if there are any: not what tells one run from another."""
    given = []
    for tree in trees:
        spans = [tree.spans[role] for role in tree.nodes]
        given.append([text for span in spans for value in (span.prompt, span.input) for _, text in leaves(value)])
    found = {
        name: column
        for name, column in inputs.items()
        if all(any(texts(value) in text for text in row) for value, row in zip(column, given, strict=True))
    }
    return found or inputs


def _asked(tree: Tree) -> Span:
    """The outermost span around all values that says what it was given, the first of all where there is none."""
    first, last = min(tree.nodes), max(tree.nodes)
    shared = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    around = [tree.spans[first[:end]] for end in range(1, min(shared, len(first)) + 1)]
    return next((span for span in around if span.input is not None), around[0] if around else tree.first)


def _model(
    name: str,
    role: Role,
    spans: Sequence[Span],
    trees: Sequence[Tree],
    variables: list[Variable],
    nodes: list[NodeProposal],
    names: dict[Role, str],
    recorded: bool,
) -> list[NodeProposal]:
    """A model's node, behind the nodes that its prompt needs."""
    values = tuple(span.answer or "" for span in spans)
    prompts = [contents_of(span.prompt) for span in spans]
    known = {variable.name: variable for variable in variables}
    tool = RECORDED if recorded else None
    if REQUEST in known and known[REQUEST].texts == [texts(span.prompt) for span in spans]:
        # The request is the whole prompt, be it messages.
        return [NodeProposal(name, role, (REQUEST,), values, tool=tool)]
    template, why = find_template(prompts, variables)
    more = [] if template is not None else _derived(role, trees, variables, names, nodes)
    if more:
        template, why = find_template(prompts, [*variables, *more])
    if template is not None:
        used = slots(template)
        extra = [variable.made_by for variable in more if variable.name in used]
        variables += [variable for variable in more if variable.name in used]
        parents = tuple(variable.name for variable in variables if variable.name in used)
        return [*extra, NodeProposal(name, role, parents, values, template, tool)]
    parents = _mentioned([span.prompt for span in spans], variables)
    if recorded:
        return [NodeProposal(name, role, parents, values, tool=tool, why=why)]
    others = {*names.values(), *(variable.name for variable in variables), *(node.name for node in nodes)}
    asked = _free(f"{name}_prompt", others)
    prompt = NodeProposal(asked, None, parents, tuple(span.prompt for span in spans), tool=RECORDED, why=why)
    return [prompt, NodeProposal(name, role, (asked,), values, why=f"its prompt is the node {asked}: {why}")]


def _tool(
    name: str,
    role: Role,
    spans: Sequence[Span],
    trees: Sequence[Tree],
    variables: list[Variable],
    names: dict[Role, str],
) -> NodeProposal:
    values = tuple(map(output_text, spans))
    inside = [names[other] for other in trees[0].nodes if other[: len(role)] == role and other != role]
    parents = _mentioned([span.input for span in spans], variables, inside)
    return NodeProposal(name, role, parents, values, tool=RECORDED)


def _loop(
    name: str, role: Role, trees: Sequence[Tree], variables: list[Variable], names: dict[Role, str], recorded: bool
) -> NodeProposal:
    """A loop whose turns are the recorded prompt, what the model said, and what tools answered."""
    spans = [span for tree in trees for span in tree.of(role)]
    taken = {TOLD, *names.values(), *(variable.name for variable in variables)}
    loop = _free((_slug(role[-2]) if len(role) > 1 else "") or "agent", taken)
    read = (*_mentioned([tree.turns[0].model.prompt for tree in trees], variables), loop)
    asked = _free(f"{name}_prompt", {*taken, loop})
    prompt = NodeProposal(asked, None, read, tuple(span.prompt for span in spans), tool=RECORDED)
    parents, tool = (read, RECORDED) if recorded else ((asked,), None)
    model = NodeProposal(name, role, parents, tuple(span.answer or "" for span in spans), tool=tool)
    answers = tuple(told(turn) for tree in trees for turn in tree.turns)
    body = (*(() if recorded else (prompt,)), model, NodeProposal(TOLD, None, (name,), answers, tool=RECORDED))
    return NodeProposal(loop, None, (), (), body=body, turns=max(len(tree.turns) for tree in trees))


def _mentioned(values: Sequence[Any], variables: Sequence[Variable], inside: Sequence[str] = ()) -> tuple[str, ...]:
    """The variables that each of the values holds; all of them where none is held, for nothing says what was read."""
    held = [[text for _, text in leaves(value)] for value in values]
    found = []
    for variable in variables:
        rows = (
            variable.texts
            if variable.texts is not None
            else [each[0] if each else "" for each in variable.documents or []]
        )
        pairs = zip(rows, held, strict=True)
        if variable.name in inside or (any(rows) and all(any(text in part for part in parts) for text, parts in pairs)):
            found.append(variable.name)
    return tuple(found) or tuple(variable.name for variable in variables)


def _derived(
    role: Role,
    trees: Sequence[Tree],
    variables: Sequence[Variable],
    names: dict[Role, str],
    nodes: Sequence[NodeProposal],
) -> list[Variable]:
    """Texts that the program made of earlier values: without space around them, and what its parts gave."""
    made: list[Variable] = []
    known = [variable.texts for variable in variables]
    taken = {*names.values(), *(variable.name for variable in variables), *(node.name for node in nodes)}

    def add(name: str, column: list[str], parents: tuple[str, ...], tool: str) -> None:
        if column in known or not any(column) or not parents:
            return
        name = name if name not in taken else _free(f"{name}_of_{parents[-1]}", taken)
        node = NodeProposal(name, None, parents, tuple(column), tool=tool)
        made.append(Variable(name, column, made_by=node))
        known.append(column)
        taken.add(name)

    for node in nodes:
        if node.role is not None and all(isinstance(value, str) for value in node.values):
            add(f"{node.name}_stripped", [value.strip() for value in node.values], (node.name,), STRIPPED)
    before = trees[0].nodes[: trees[0].nodes.index(role)]
    for other in trees[0].spans:
        inside = tuple(names[one] for one in before if one[: len(other)] == other)
        if other in names or not inside or role[: len(other)] == other:
            continue
        if any(other not in tree.spans for tree in trees):
            continue
        rows = [dict(leaves(tree.spans[other].output)) for tree in trees]
        for field in rows[0]:
            if all(field in row for row in rows):
                add(_slug(field) or f"{inside[-1]}_out", [row[field] for row in rows], inside, RECORDED)
    return made


def _free(name: str, taken: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    numbers = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
    return next(one for one in numbers if one not in taken)


def _slug(name: str) -> str:
    """A name of lower-case letters, digits and underscores: of "Predict(Draft).forward" draft."""
    number = f"_{name.rpartition('#')[2]}" if re.search(r"#\d+$", name) else ""
    name = re.sub(r"#\d+$", "", name)
    inside = re.search(r"\((\w+)\)", name)
    name = inside[1] if inside else re.sub(r"\.(a?forward|__call__|acall|a?invoke|run)$", "", name)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    name = re.sub(r"\W+", "_", name).strip("_").lower()
    return f"{'n' if name[:1].isdigit() else ''}{name}{number}".lstrip("_")
