"""The nodes of a system, whether they form one, and whose fault it is where a node's component fails."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import Tool
from sysdpo_jax.errors import meant
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
    """

    name: str
    component: Component
    parents: tuple[str, ...] = ()
    params: str | None = None
    plate: int | None = None
    weight: float = 1.0

    @property
    def params_key(self) -> str:
        return self.name if self.params is None else self.params

    @cached_property
    def deterministic(self) -> bool:
        """Whether the node is a Tool: no parameters, recomputed when a record lacks its value."""
        return isinstance(self.component, Tool)

    def tree(self, params: Params) -> Params:
        """The node's own parameters.

        Args:
            params: `{params_key: tree}` of the system.

        Returns:
            What `encode`, `log_prob` and `sample` of the component take; empty for a tool.
        """
        return params.get(self.params_key, {})


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


def check_names(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> None:
    """Raise `GraphError` for a name that is there twice, unknown or not read, and a plate without copies."""
    seen: set[str] = set()
    for name in (*inputs, *(node.name for node in nodes)):
        if name in seen:
            raise GraphError(f"the name {name!r} is used twice: every input and node needs a name of its own")
        seen.add(name)
    for node in nodes:
        for parent in node.parents:
            if parent not in seen:
                near = meant(parent, seen, "add a node or an input of that name")
                raise GraphError(f"node {node.name!r} has an unknown parent {parent!r}: {near}")
        if node.plate is not None and node.plate < 1:
            raise GraphError(f"node {node.name!r} has plate={node.plate}: it needs at least one copy")
    read = {parent for node in nodes for parent in node.parents}
    for name in inputs:
        if name not in read:
            raise GraphError(f"no node reads the input {name!r}: name it among a node's parents or take it out")


def topological(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> tuple[Node, ...]:
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


def check_plates(nodes: tuple[Node, ...]) -> None:
    """Raise `GraphError` for plates that do not match, and strata that do not fit them."""
    plates = {node.name: node.plate for node in nodes}
    for node in nodes:
        component = node.component
        if isinstance(component, TextToImage) and (node.plate or 1) % component.strata:
            raise GraphError(
                f"node {node.name!r} has a component of strata={component.strata}, which must divide its plate of "
                f"{node.plate or 1}: copies share what strata spread, rows of a batch do not"
            )
        for parent in node.parents:
            if node.plate is not None and plates.get(parent) not in (None, node.plate):
                raise GraphError(
                    f"node {node.name!r} is a plate of {node.plate} but its parent {parent!r} is one of "
                    f"{plates[parent]}: copies are matched one to one, so the plates must be equal"
                )


def check_static(nodes: tuple[Node, ...]) -> None:
    """Raise `GraphError` for a component that cannot be hashed, naming the field."""
    for node in nodes:
        found = unhashable(node.component, type(node.component).__name__)
        if found is not None:
            raise GraphError(
                f"the component of node {node.name!r} cannot be hashed because of {found}: a system is static, so give "
                "tuples instead of lists, and keep arrays in the parameters"
            )
