"""What a system is made of: nodes in topological order, what each depends on, and the parameters that they need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.errors import meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.nodes import GraphError, Node, check_names, check_plates, check_static, topological, users_part
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Graph:
    """The structure of a `CompoundSystem`, which says what its fields are and what is refused."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        nodes = tuple(replace(node, parents=tuple(node.parents)) for node in self.nodes)
        check_names(self.inputs, nodes)
        object.__setattr__(self, "nodes", topological(self.inputs, nodes))
        check_plates(self.nodes)
        check_static(self.nodes)

    @property
    def param_keys(self) -> tuple[str, ...]:
        """The keys of the parameter trees, in topological order, without repeats."""
        return tuple(dict.fromkeys(node.params_key for node in self.nodes if not node.deterministic))

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
        """Make fresh parameters. Nodes that share a key share the tree of the first of them.

        Args:
            key: Of which every tree gets a part by its own name.

        Returns:
            `{params_key: tree}`.

        Raises:
            GraphError: If nodes share a key and need trees of different shapes.
        """
        params: dict[str, Params] = {}
        for node in self.nodes:
            if node.deterministic:
                continue
            with users_part(node, "init", GraphError):
                shape = jax.eval_shape(node.component.init, key)
                if node.params_key not in params:
                    params[node.params_key] = node.component.init(named_key(key, node.params_key))
                    continue
            if shape != jax.eval_shape(lambda tree: tree, params[node.params_key]):
                raise GraphError(
                    f"node {node.name!r} shares the parameters {node.params_key!r} with another node but its component "
                    "needs parameters of another shape: give it a params key of its own"
                )
        return params

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
            lines.append(f'    {node.name}{left}"{node.name}{plate}: {type(node.component).__name__}{shared}"{right}')
            lines.extend(f"    {parent} --> {node.name}" for parent in node.parents)
        return "\n".join(lines)
