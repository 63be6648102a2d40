"""What a system is made of: nodes, loops of nodes, and the errors that name them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.components.control import Turns
from sysdpo_jax.components.deterministic import Deterministic
from sysdpo_jax.models.lora import on_base
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
        loop: The loop whose turns hold the value, see `Loop`.
    """

    name: str
    component: Component
    parents: tuple[str, ...] = ()
    params: str | None = None
    plate: int | None = None
    weight: float = 1.0
    base: str | None = None
    loop: str | None = None

    @property
    def params_key(self) -> str:
        return self.name if self.params is None else self.params

    @property
    def weights_key(self) -> str:
        """Key of the tree that holds the weights: the base's, where there is one."""
        return self.params_key if self.base is None else self.base

    @cached_property
    def deterministic(self) -> bool:
        """Whether the node is a tool, a switch or a loop: no parameters of its own, exactly 0 in the loss."""
        return isinstance(self.component, Deterministic)

    @property
    def has_params(self) -> bool:
        """Whether it has parameters, and so a part in the loss: not of what is deterministic, nor of a remote model."""
        return not self.component.parameterless

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


@dataclass(frozen=True, init=False)
class Loop(Node):
    """Up to so many turns of the same nodes, with the same parameters.

    Its value in a record is the list of its turns, each `{body node: value}`. Nodes of the body read what lies outside,
    each other's values of the same turn, and by the loop's own name the list of the turns before: [] in the first one.
    Nodes outside read the loop's name. The system writes a loop out: its `nodes` have those of the body, and behind
    them the loop's own, which reads them.

    Args:
        name: Of the value in records.
        body: The nodes of a turn. None of them is a loop.
        turns: How many there are at most.
        until: Called with a turn, whether it is the last one; by default a loop has all its turns.

    Raises:
        GraphError: For a loop in the body.
        ValueError: For a number of turns below 1, and a condition that cannot be called.
    """

    body: tuple[Node, ...] = ()

    def __init__(
        self,
        name: str,
        body: tuple[Node, ...],
        turns: int,
        until: Callable[[Mapping[str, Any]], bool] | None = None,
    ):
        for node in body:
            if isinstance(node, Loop):
                raise GraphError(f"loop {name!r}: its node {node.name!r} is a loop: write that out, or join the bodies")
        super().__init__(name, Turns(turns, until), tuple(node.name for node in body))
        object.__setattr__(self, "body", tuple(replace(node, loop=name) for node in body))

    def written_out(self) -> tuple[Node, ...]:
        """The loop as nodes.

        Returns:
            Those of the body, then the loop's own.
        """
        return *self.body, Node(self.name, self.component, self.parents)


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
