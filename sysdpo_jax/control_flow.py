"""Which nodes run in which rows: what only branches of a switch read runs where such a branch is chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Any

from sysdpo_jax.components.control import Switch, Turns
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.errors import meant
from sysdpo_jax.nodes import Node
from sysdpo_jax.typing import Record
from sysdpo_jax.user_code import name_of, shown, user_code


@dataclass(frozen=True)
class Flow:
    """The nodes of one scope, the system's own or the body of a loop, in any order.

    Args:
        nodes: Of the scope; of a loop in it the node that stands for it.
        reads: `{node: what it reads}`, of a loop what its body reads from outside.
    """

    nodes: tuple[Node, ...]
    reads: Mapping[str, tuple[str, ...]]

    @cached_property
    def conditional(self) -> frozenset[str]:
        """The nodes that do not run in every row."""
        return frozenset(self._choosers)

    @cached_property
    def depends(self) -> dict[str, tuple[str, ...]]:
        """`{node: what must be known before it}`: what it reads, and what decides whether it runs."""
        return {
            name: tuple(dict.fromkeys((*self.reads[name], *self._choosers.get(name, ())))) for name in self._readers
        }

    def runs(self, name: str, record: Record) -> bool:
        """Whether a node runs.

        Args:
            name: Of a node.
            record: With the values of what it depends on.

        Returns:
            Whether something that runs reads it, or nothing does.

        Raises:
            ToolError: For a value that is none of a switch's cases, naming both.
        """
        known: dict[str, bool] = {}

        def needed(node: str) -> bool:
            if node not in known:
                known[node] = node not in self.conditional or any(
                    needed(reader) and (not self._is_branch(reader, node) or self.chosen(reader, record) == node)
                    for reader in self._readers[node]
                )
            return known[node]

        return needed(name)

    def chosen(self, switch: str, record: Record) -> str:
        """The branch that a switch takes.

        Args:
            switch: Its name.
            record: With the value that chooses.

        Returns:
            The name of what the branch is the value of.

        Raises:
            ToolError: For a value that is no case.
        """
        node = self._switches[switch]
        component: Any = node.component
        try:
            return node.parents[1 + component.branch(record[node.parents[0]])]
        except ToolError as error:
            raise ToolError(f"node {switch!r}: the value of {node.parents[0]!r}, {error}", refused=True) from None

    @cached_property
    def _switches(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes if isinstance(node.component, Switch)}

    @cached_property
    def _readers(self) -> dict[str, list[str]]:
        return {node.name: [name for name, read in self.reads.items() if node.name in read] for node in self.nodes}

    @cached_property
    def _choosers(self) -> dict[str, tuple[str, ...]]:
        """`{node that does not run in every row: what decides whether it does}`."""
        found: dict[str, tuple[str, ...]] = {}
        for name in TopologicalSorter(self._readers).static_order():
            readers = self._readers[name]
            if not readers or any(reader not in found and not self._is_branch(reader, name) for reader in readers):
                continue
            own = [found.get(reader, ()) for reader in readers]
            own += [(self._switches[reader].parents[0],) for reader in readers if self._is_branch(reader, name)]
            found[name] = tuple(dict.fromkeys(chooser for choosers in own for chooser in choosers))
        return found

    def _is_branch(self, reader: str, name: str) -> bool:
        """Whether a node is read as a branch alone: neither what chooses nor what that follows from."""
        return reader in self._switches and name not in self._deciding[reader]

    @cached_property
    def _deciding(self) -> dict[str, set[str]]:
        """`{switch: what chooses in it, and all that this follows from}`."""
        found: dict[str, set[str]] = {}
        for name, switch in self._switches.items():
            reached, waiting = set[str](), list(switch.parents[:1])
            while waiting:
                last = waiting.pop()
                if last not in reached:
                    reached.add(last)
                    waiting += self.reads.get(last, ())
            found[name] = reached
        return found


def scopes(nodes: Sequence[Node]) -> tuple[Flow, dict[str, Flow]]:
    """The flow of a system and, by their names, those of its loops.

    Args:
        nodes: With loops written out, in any order.

    Returns:
        Both; the nodes of a body read one another's values in them.
    """
    bodies: dict[str, list[Node]] = {node.name: [] for node in nodes if isinstance(node.component, Turns)}
    for node in nodes:
        if node.loop is not None:
            bodies[node.loop].append(node)
    inside = {loop: {loop, *(node.name for node in body)} for loop, body in bodies.items()}
    outer = {
        node.name: tuple(
            dict.fromkeys(p for own in bodies[node.name] for p in own.parents if p not in inside[node.name])
        )
        if node.name in bodies
        else node.parents
        for node in nodes
        if node.loop is None
    }
    whole = Flow(tuple(node for node in nodes if node.loop is None), outer)
    return whole, {loop: Flow(tuple(body), {node.name: node.parents for node in body}) for loop, body in bodies.items()}


def ends(component: Turns, turn: Mapping[str, Any]) -> Any:
    """Whether a turn is the last one, or the `ToolError` of a condition that fails."""
    if component.until is None:
        return False
    try:
        with user_code(f"the condition {name_of(component.until)} for {shown(turn)}", ToolError):
            return bool(component.until(dict(turn)))
    except ToolError as error:
        return error


def fault_of_end(component: Turns, number: int, count: int, ended: bool) -> str | None:
    """What keeps a run of `count` turns from being the loop's, given whether the turn `number` ends it."""
    condition = "" if component.until is None else f" the condition {name_of(component.until)}"
    if ended and number < count:
        return f"has {count} turns, but{condition} ends it with turn {number}: leave out what follows"
    if not ended and number == count < component.turns:
        why = f"{condition} does not end it there" if condition else " it has no condition to end it"
        return f"stops at turn {number} of {component.turns}, but{why}: add the turns that follow, or drop the record"
    return None


def fault_of_turns(value: Any, names: Sequence[str], most: int) -> str | None:
    """What keeps a value from being the turns of a loop, whose names and largest number are given."""
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        return f"is {shown({'it': value})}: give the list of its turns, each an object of {', '.join(names)}"
    if not 1 <= len(value) <= most:
        return f"has {len(value)} turns: a run has from 1 to {most} of them"
    for number, turn in enumerate(value, 1):
        for name in turn:
            if name not in names:
                return f"has {name!r} in turn {number}, which is none of its names: {meant(name, names)}"
    return None
