"""What a system is made of: nodes in topological order, what each depends on, and the parameters that they need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import Tool, ToolError
from sysdpo_jax.errors import meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.models.lora import on_base
from sysdpo_jax.static import unhashable
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import is_users, name_of, user_code


class GraphError(ValueError):
    """The nodes do not form a valid system, or a component fails in it: names the node and the remedy."""


@dataclass(frozen=True)
class Node:
    """One value of the system and the component that produces it.

    Args:
        name: Of the value in records.
        component: What produces it.
        parents: Names of inputs or other nodes, in the order in which the component takes them.
        params: Key of the parameter tree, the node's name by default; nodes with the same key share weights.
        plate: Number of copies, or None for a single value.
        weight: Multiplies the node's log-ratio in the system's sum: it scales a surrogate against exact
            log-probabilities.
        base: Key of a tree that holds the weights, in place of its own: the tree under `params` holds a role's LoRA
            factors alone (`lora_factors`). Roles share the base's weights, which are not trained; the base's own
            factors, if it has some, are a role's like the others'.
    """

    name: str
    component: Component
    parents: tuple[str, ...] = ()
    params: str | None = None
    plate: int | None = None
    weight: float = 1.0
    base: str | None = None

    @property
    def params_key(self) -> str:
        return self.name if self.params is None else self.params

    @property
    def weights_key(self) -> str:
        """Key of the tree that holds the weights: the base's, where there is one."""
        return self.params_key if self.base is None else self.base

    @cached_property
    def deterministic(self) -> bool:
        """Whether the node is a Tool: no parameters, recomputed when a record lacks its value."""
        return isinstance(self.component, Tool)

    def tree(self, params: Params) -> Params:
        """The node's whole parameters, which `pretrained.save` takes too.

        Args:
            params: `{params_key: tree}` of the system.

        Returns:
            What `log_prob` and `sample` of the component take; empty for a tool. Those of a role are the base's arrays
            and its own.
        """
        own = params.get(self.params_key, {})
        return own if self.base is None else on_base(params[self.base], own)


@contextmanager
def naming(node: Node) -> Iterator[None]:
    """Put the node's name in front of a `RecordError`."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"node {node.name!r}: {error}") from error


def users_part(node: Node, method: str, failure: type[RecordError] | type[GraphError]) -> AbstractContextManager[None]:
    """Around a call of a component: where it is the user's own, whatever it raises is its failure."""
    if not is_users(node.component):
        return nullcontext()
    # Who handles a `RecordError` names the node.
    place = "" if failure is RecordError else f"node {node.name!r}: "
    return user_code(f"{place}{name_of(type(node.component))}.{method}", failure, (RecordError, GraphError))


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
        nodes = tuple(replace(node, parents=tuple(node.parents)) for node in self.nodes)
        _check_names(self.inputs, nodes)
        object.__setattr__(self, "nodes", _topological(self.inputs, nodes))
        plates = {node.name: node.plate for node in nodes}
        for node in self.nodes:
            _check_node(node, plates)
        _check_bases([node for node in self.nodes if not node.deterministic])

    @property
    def param_keys(self) -> tuple[str, ...]:
        """The keys of the parameter trees, in topological order, without repeats."""
        nodes = [node for node in self.nodes if not node.deterministic]
        return tuple(dict.fromkeys(key for node in nodes for key in (node.weights_key, node.params_key)))

    @cached_property
    def intermediates(self) -> tuple[Node, ...]:
        """The generative nodes that another generative node depends on, directly or through tools."""
        read: set[str] = set()
        for node in reversed(self.nodes):
            # What a tool reads matters only if a generative node reads the tool.
            if not node.deterministic or node.name in read:
                read.update(node.parents)
        return tuple(node for node in self.nodes if not node.deterministic and node.name in read)

    @property
    def given(self) -> tuple[Node, ...]:
        """The tools that read inputs alone, directly or through each other: retrieval, say."""
        drawn = {node.name for node in self.nodes if not node.deterministic}
        for node in self.nodes:
            if drawn.intersection(node.parents):
                drawn.add(node.name)
        return tuple(node for node in self.nodes if node.name not in drawn)

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The other generative nodes: the final values, which people judge."""
        inner = self.intermediates
        return tuple(node for node in self.nodes if not node.deterministic and node not in inner)

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
            names: Of nodes.

        Returns:
            The nodes in topological order.
        """
        wanted = {self.node(name).name for name in names}
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted.update(node.parents)
        return tuple(node for node in self.nodes if node.name in wanted)

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
            if node.deterministic:
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
            Mermaid's: boxes are inputs, rounded boxes components, hexagons tools.
        """
        lines = ["graph LR", *(f"    {name}[{name}]" for name in self.inputs)]
        for node in self.nodes:
            plate = f" x{node.plate}" if node.plate else ""
            left, right = ("{{", "}}") if node.deterministic else ("(", ")")
            shared = "" if node.params_key == node.name or node.deterministic else f", params {node.params_key}"
            shared += "" if node.base is None else f" on {node.base}"
            lines.append(f'    {node.name}{left}"{node.name}{plate}: {type(node.component).__name__}{shared}"{right}')
            lines.extend(f"    {parent} --> {node.name}" for parent in node.parents)
        return "\n".join(lines)


def _check_names(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> None:
    """Raise `GraphError` for a name that is there twice, unknown or not read."""
    names = [*inputs, *(node.name for node in nodes)]
    for name in names:
        if names.count(name) > 1:
            raise GraphError(f"the name {name!r} is used twice: every input and node needs a name of its own")
    read = [(node.name, parent) for node in nodes for parent in node.parents]
    for name, parent in read:
        if parent not in names:
            near = meant(parent, names, "add a node or an input of that name")
            raise GraphError(f"node {name!r} has an unknown parent {parent!r}: {near}")
    for name in inputs:
        if name not in {parent for _, parent in read}:
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


def _topological(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Parents before children; among the ready ones the order in which they were written."""
    ordered: list[Node] = []
    known, waiting = set(inputs), list(nodes)
    while waiting:
        ready = next((node for node in waiting if known.issuperset(node.parents)), None)
        if ready is None:
            cycle = _find_cycle({node.name: [p for p in node.parents if p not in known] for node in waiting})
            raise GraphError(
                f"the nodes form a cycle: {' -> '.join(cycle)}; node {cycle[0]!r} must not depend on itself"
            )
        waiting.remove(ready)
        ordered.append(ready)
        known.add(ready.name)
    return tuple(ordered)


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
