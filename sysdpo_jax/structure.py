"""A graph of nodes: their topological order, what each depends on, and the parameters that they need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.control import Switch, Turns
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import Tool, ToolError
from sysdpo_jax.control_flow import Flow, scopes
from sysdpo_jax.errors import meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.nodes import GraphError, Loop, Node, users_part
from sysdpo_jax.static import unhashable
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.user_code import name_of


@dataclass(frozen=True)
class Graph:
    """The structure of a `CompoundSystem`, which says what its fields are and what is refused."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        for names in (self.inputs, *(node.parents for node in self.nodes)):
            if isinstance(names, str):
                raise GraphError(f"the names of inputs or parents are the text {names!r}: write ({names!r},)")
        object.__setattr__(self, "inputs", tuple(self.inputs))
        entries = (node.written_out() if isinstance(node, Loop) else (node,) for node in self.nodes)
        nodes = tuple(replace(node, parents=tuple(node.parents)) for entry in entries for node in entry)
        _check_names(self.inputs, nodes)
        object.__setattr__(self, "nodes", _ordered(self.inputs, nodes))
        plates = {node.name: node.plate for node in nodes}
        for node in self.nodes:
            _check_node(node, plates)
        _check_bases([node for node in self.nodes if node.has_params])

    @property
    def flow(self) -> Flow:
        """Which nodes run in which records."""
        return self._scopes[0]

    @property
    def bodies(self) -> Mapping[str, Flow]:
        """By the names of loops, which nodes of their bodies run in which turns."""
        return self._scopes[1]

    @cached_property
    def _scopes(self) -> tuple[Flow, dict[str, Flow]]:
        return scopes(self.nodes)

    @property
    def recorded(self) -> tuple[Node, ...]:
        """The nodes whose values records have under their names: all but those of loops' bodies."""
        return tuple(node for node in self.nodes if node.loop is None)

    def values(self, run: Record) -> dict[str, Any]:
        """What the nodes of a run gave.

        Args:
            run: As `CompoundSystem.sample` returns it.

        Returns:
            `{node: value}` without the inputs, and without the nodes that did not run.
        """
        return {node.name: run[node.name] for node in self.recorded if node.name in run}

    def most_turns(self, loop: str) -> int:
        """How many turns a loop has at most.

        Args:
            loop: Its name.

        Returns:
            Its `turns`.
        """
        component: Any = self.node(loop).component
        return int(component.turns)

    def is_routed(self, node: Node) -> bool:
        """Whether a node does not run exactly once in every record.

        Args:
            node: One of the system.

        Returns:
            Whether it is a loop's, or stands behind a switch.
        """
        return node.loop is not None or node.name in self.flow.conditional

    @property
    def param_keys(self) -> tuple[str, ...]:
        """The keys of the parameter trees, in topological order, without repeats."""
        nodes = [node for node in self.nodes if node.has_params]
        return tuple(dict.fromkeys(key for node in nodes for key in (node.weights_key, node.params_key)))

    @cached_property
    def intermediates(self) -> tuple[Node, ...]:
        """The generative nodes that another generative node depends on, directly or through tools and switches.

        A loop with a generative node is one of them where it stands, and its body none.
        """
        read: set[str] = set()
        for node in reversed(self.recorded):
            # What a tool reads matters only if a generative node reads the tool.
            if self.draws(node) or node.name in read:
                read.update(self.flow.depends[node.name])
        return tuple(node for node in self.recorded if self.draws(node) and node.name in read)

    def draws(self, node: Node) -> bool:
        """Whether the value of a node is drawn.

        Args:
            node: One of `recorded`.

        Returns:
            True for a generative node, and a loop that has one.
        """
        inner = self.bodies[node.name].nodes if node.name in self.bodies else (node,)
        return not all(each.deterministic for each in inner)

    @property
    def given(self) -> tuple[Node, ...]:
        """The tools that read inputs alone, directly or through each other: retrieval, say."""
        drawn = {node.name for node in self.recorded if self.draws(node)}
        for node in self.recorded:
            if drawn.intersection(self.flow.depends[node.name]):
                drawn.add(node.name)
        return tuple(node for node in self.recorded if node.name not in drawn)

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The other generative nodes: the final values, which people judge."""
        inner = self.intermediates
        return tuple(node for node in self.recorded if self.draws(node) and node not in inner)

    def node(self, name: str) -> Node:
        """Look a node up.

        Args:
            name: Its name.

        Returns:
            The node.

        Raises:
            GraphError: If there is none of that name.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"no node is called {name!r}: {meant(name, (node.name for node in self.nodes))}")

    def with_ancestors(self, names: Sequence[str]) -> tuple[Node, ...]:
        """Some nodes and all that they depend on.

        Args:
            names: Of nodes; one of a loop's body stands for the loop.

        Returns:
            Those of `recorded`, in topological order.
        """
        wanted = {node.loop or node.name for node in map(self.node, names)}
        for node in reversed(self.recorded):
            if node.name in wanted:
                wanted.update(self.flow.depends[node.name])
        return tuple(node for node in self.recorded if node.name in wanted)

    def init(self, key: PRNGKeyArray) -> Params:
        """Make fresh parameters. Nodes that share a key, or a base, share the tree of the first of them.

        The tree of a role is empty: put what `lora_factors` makes of its base there.

        Args:
            key: Of which every tree gets a part by its own name.

        Returns:
            `{params_key: tree}`.

        Raises:
            GraphError: If nodes share weights and need trees of different shapes.
        """
        params: dict[str, Params] = {}
        for node in self.nodes:
            if not node.has_params:
                continue
            weights = node.weights_key
            with users_part(node, "init", GraphError):
                if weights not in params:
                    params[weights] = node.component.init(named_key(key, weights))
                    continue
                shape = jax.eval_shape(node.component.init, key)
            if shape != jax.eval_shape(lambda tree: tree, params[weights]):
                raise GraphError(
                    f"node {node.name!r} shares the parameters {weights!r} with another node but its component needs "
                    "parameters of another shape: give it a params key of its own"
                )
        return {name: params.get(name, {}) for name in self.param_keys}

    def check_params(self, params: Params) -> None:
        """Check that the parameters are the system's.

        Args:
            params: `{params_key: tree}`.

        Raises:
            ValueError: Naming the trees that are missing or unknown.
        """
        missing, unknown = set(self.param_keys) - set(params), set(params) - set(self.param_keys)
        if missing or unknown:
            raise ValueError(
                f"the parameters do not fit the system: missing {sorted(missing)}, unknown {sorted(unknown)}; "
                f"expected the keys {list(self.param_keys)}, as system.init returns them"
            )

    def describe(self) -> str:
        """Draw the graph as text.

        Returns:
            Mermaid's: boxes are inputs, rounded boxes components, hexagons tools, diamonds switches, and a frame is the
            body of a loop. Edges of a branch say its case; dotted ones lead from earlier turns.
        """
        lines = ["graph LR", *(f"    {name}[{name}]" for name in self.inputs)]
        for loop, body in self.bodies.items():
            lines += [f'    subgraph {loop}_turns["{loop}: up to {self.most_turns(loop)} turns"]']
            lines += ["    end" if node is None else _box(node) for node in (*body.nodes, None)]
        lines += [_box(node) for node in self.recorded]
        for node in self.nodes:
            cases = node.component.cases if isinstance(node.component, Switch) else ()
            labels = dict(enumerate((f' -- "{case}"' for case in cases), 1))
            for place, parent in enumerate(node.parents):
                arrow = " -.->" if parent == node.loop else f"{labels.get(place, '')} -->"
                lines.append(f"    {parent}{arrow} {node.name}")
        return "\n".join(lines)


def _box(node: Node) -> str:
    """A node in Mermaid's language."""
    plate = f" x{node.plate}" if node.plate else ""
    left, right = ("{{", "}}") if node.deterministic else ("(", ")")
    left, right = ("{", "}") if isinstance(node.component, Switch) else (left, right)
    shared = "" if node.params_key == node.name or not node.has_params else f", params {node.params_key}"
    shared += "" if node.base is None else f" on {node.base}"
    return f'    {node.name}{left}"{node.name}{plate}: {type(node.component).__name__}{shared}"{right}'


def _check_names(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> None:
    """Raise `GraphError` for a name that is there twice, unknown or not read."""
    names = [*inputs, *(node.name for node in nodes)]
    for name in names:
        if names.count(name) > 1:
            raise GraphError(f"the name {name!r} is used twice: every input and node needs a name of its own")
    loops = {node.name: node.loop for node in nodes}
    for node in nodes:
        for parent in node.parents:
            if parent not in names:
                near = meant(parent, names, "add a node or an input of that name")
                raise GraphError(f"node {node.name!r} has an unknown parent {parent!r}: {near}")
            loop = loops.get(parent)
            if loop not in (None, node.loop) and node.name != loop:
                raise GraphError(
                    f"node {node.name!r} reads {parent!r}, of a turn of the loop {loop!r}: read {loop!r}, the list of "
                    "its turns"
                )
        if node.loop is not None and node.loop not in names:
            raise GraphError(f"node {node.name!r} is of a loop {node.loop!r} that there is not: make it with Loop")
    read = {parent for node in nodes for parent in node.parents}
    for name in inputs:
        if name not in read:
            raise GraphError(f"no node reads the input {name!r}: name it among a node's parents or take it out")


def _check_node(node: Node, plates: Mapping[str, int | None]) -> None:
    """Raise `GraphError` for a plate that does not fit, and a component that cannot be hashed, naming the field."""
    component, plate = node.component, 1 if node.plate is None else node.plate
    if plate < 1:
        raise GraphError(f"node {node.name!r} has plate={plate}: it needs at least one copy")
    if isinstance(component, TextToImage) and plate % component.strata:
        raise GraphError(
            f"node {node.name!r} has a component of strata={component.strata}, which must divide its plate of {plate}: "
            "copies share what strata spread, rows of a batch do not"
        )
    if isinstance(component, Switch | Turns) and node.plate is not None:
        raise GraphError(
            f"node {node.name!r} is a {type(component).__name__} with a plate, which it cannot have: drop it"
        )
    if isinstance(component, Switch) and len(node.parents) != 1 + len(component.cases):
        raise GraphError(
            f"node {node.name!r} has {len(node.parents)} parents and its switch {len(component.cases)} cases: give "
            "what chooses, then a branch for each case"
        )
    if isinstance(component, Turns) and not node.parents:
        raise GraphError(f"the loop {node.name!r} has no node: give it a body")
    for parent in node.parents:
        if node.plate is not None and plates.get(parent) not in (None, node.plate):
            raise GraphError(
                f"node {node.name!r} is a plate of {node.plate} but its parent {parent!r} is one of "
                f"{plates[parent]}: copies are matched one to one, so the plates must be equal"
            )
    found = unhashable(component, type(component).__name__)
    if found is not None:
        raise GraphError(
            f"the component of node {node.name!r} cannot be hashed because of {found}: a system is static, so give "
            "tuples instead of lists, and keep arrays in the parameters"
        )


def _check_bases(nodes: Sequence[Node]) -> None:
    """Raise `GraphError` for a base that is itself a role, and for nodes of one key that have several."""
    bases: dict[str, str | None] = {}
    for node in nodes:
        if bases.setdefault(node.params_key, node.base) != node.base:
            raise GraphError(
                f"node {node.name!r} has the base {node.base!r}, another node with the parameters {node.params_key!r} "
                f"the base {bases[node.params_key]!r}: give both the same, or keys of their own"
            )
    for key, base in bases.items():
        if base is not None and (base == key or bases.get(base) is not None):
            raise GraphError(
                f"the base {base!r} of {key!r} is a role itself, without weights of its own: name the key that has them"
            )


def _ordered(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Parents before children, and what decides whether a node runs before it; loops behind their bodies."""
    whole, bodies = scopes(nodes)
    for scope in (whole, *bodies.values()):
        _sorted(scope.nodes, scope.reads)
    ordered: list[Node] = []
    for node in _sorted(whole.nodes, whole.depends):
        if node.name in bodies:
            ordered += _sorted(bodies[node.name].nodes, bodies[node.name].depends)
        ordered.append(node)
    return tuple(ordered)


def _sorted(nodes: Sequence[Node], before: Mapping[str, Sequence[str]]) -> list[Node]:
    """The nodes of one scope; among the ready ones the order in which they were written.

    before: names that come first, of which those that are none of these nodes are there already.
    """
    ordered, waiting = list[Node](), list(nodes)
    while waiting:
        names = {node.name for node in waiting}
        ready = next((node for node in waiting if names.isdisjoint(before[node.name])), None)
        if ready is None:
            cycle = _find_cycle({node.name: [p for p in before[node.name] if p in names] for node in waiting})
            raise GraphError(
                f"the nodes form a cycle: {' -> '.join(cycle)}; node {cycle[0]!r} must not depend on itself"
            )
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _find_cycle(parents: Mapping[str, Sequence[str]]) -> list[str]:
    """A cycle as a path of names from parent to child that ends where it began; every name has a parent here."""
    path = [next(iter(parents))]
    while path[-1] not in path[:-1]:
        path.append(parents[path[-1]][0])
    return path[path.index(path[-1]) :][::-1]


def instead_of_plate(value: Any, plate: int) -> str | None:
    """What a value is instead of a plate's list, None where it is one."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return type(value).__name__
    return None if len(value) == plate else f"{len(value)} values"


def as_plate(value: Any, tool: Tool, plate: int) -> Any:
    """A plate's list of what a tool gave, or the `ToolError`."""
    instead = None if isinstance(value, ToolError) else instead_of_plate(value, plate)
    if instead is not None:
        reason = f"the tool {name_of(tool.function)} gave {instead} for a plate of {plate}: return a list of {plate}"
        return ToolError(reason, tool.on_error == "skip", refused=True)
    return value if isinstance(value, ToolError) else list(value)


def grouped(values: Sequence[Any], plate: int) -> list[list[Any]]:
    """The copies' values, a list for each row."""
    return [list(values[start : start + plate]) for start in range(0, len(values), plate)]


def by_rank(sizes: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """The first `number` of all tuples with 0 <= t[i] < sizes[i], by their sum."""
    found: list[tuple[int, ...]] = []
    level = {(0,) * len(sizes)}
    while level and len(found) < number:
        found += sorted(level)
        longer = ((*t[:i], t[i] + 1, *t[i + 1 :]) for t in level for i in range(len(sizes)))
        level = {t for t in longer if all(rank < size for rank, size in zip(t, sizes, strict=True))}
    return found[:number]
