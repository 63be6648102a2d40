"""The compound system: a directed acyclic graph of components.

p(s | x) = prod_k p_k(v_k | Pa(v_k)) (arXiv 2502.17721, section 3), so the system's log-probability is a sum over nodes.
A system is static: frozen, hashable, without arrays. Parameters are passed in, as `{params_key: tree}`.

Plates: a node with `plate=n` stands for n copies that share the parameters. Its value in a record is a list of n
values. A copy sees its own element of each parent that is a plate, and the whole of each parent that is not; a node
without a plate sees the whole list of a plated parent. Log-probabilities are summed over the plate.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import Component, RecordError, row_keys
from sysdpo_jax.components.text_to_image import TextToImage
from sysdpo_jax.components.tool import Tool
from sysdpo_jax.static import unhashable
from sysdpo_jax.typing import Features, Keys, Params, Parents, Record


class GraphError(ValueError):
    """The nodes do not form a valid system: the message names the node and the remedy."""


@dataclass(frozen=True)
class Node:
    """One value of the system and the component that produces it.

    name: of the value in records; parents: names of inputs or other nodes.
    params: key of the parameter tree, the node's name by default; two nodes with the same key share weights.
    plate: number of copies, or None for a single value.
    weight: multiplies the node's log-ratio in the system's sum (scales a surrogate against exact log-probabilities).
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

    @property
    def deterministic(self) -> bool:
        """Whether the node is a Tool: no parameters, recomputed when a record lacks its value."""
        return isinstance(self.component, Tool)


@dataclass(frozen=True)
class CompoundSystem:
    """The nodes, sorted topologically, and the names of the inputs they start from.

    Raises `GraphError` on a duplicate name, an unknown parent, a cycle, plates that do not match, an unread input or a
    component that cannot be hashed.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        nodes = tuple(replace(node, parents=tuple(node.parents)) for node in self.nodes)
        _check_names(self.inputs, nodes)
        object.__setattr__(self, "nodes", _topological(self.inputs, nodes))
        _check_plates(self.nodes)
        _check_static(self.nodes)

    @property
    def param_keys(self) -> tuple[str, ...]:
        """The keys of the parameter trees, in topological order, without repeats."""
        return tuple(dict.fromkeys(node.params_key for node in self.nodes if not node.deterministic))

    @property
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

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The other generative nodes: the final values, which people judge."""
        inner = self.intermediates
        return tuple(node for node in self.nodes if not node.deterministic and node not in inner)

    def node(self, name: str) -> Node:
        """The node of that name. Raises `GraphError` when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"no node is called {name!r}; the nodes are {', '.join(n.name for n in self.nodes)}")

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters, `{params_key: tree}`. Nodes that share a key share the tree of the first of them."""
        params: dict[str, Params] = {}
        for node in self.nodes:
            if node.deterministic:
                continue
            shape = jax.eval_shape(node.component.init, key)
            if node.params_key not in params:
                params[node.params_key] = node.component.init(_named_key(key, node.params_key))
            elif shape != jax.eval_shape(lambda tree: tree, params[node.params_key]):
                raise GraphError(
                    f"node {node.name!r} shares the parameters {node.params_key!r} with another node but its component "
                    "needs parameters of another shape: give it a params key of its own"
                )
        return params

    def prepare(self, records: Sequence[Record], nodes: Sequence[str] | None = None) -> dict[str, Features]:
        """Raw records -> `{node: features}` with a leading batch axis. A Tool's value may be missing: it is recomputed.

        nodes: the nodes to prepare, all of them by default.
        Raises `RecordError` naming the row and the node for a missing value or a plate of the wrong length.
        """
        wanted = self.nodes if nodes is None else [self.node(name) for name in nodes]
        needed = self._with_ancestors(wanted)
        complete = [self._complete(record, row, needed) for row, record in enumerate(records)]
        features = {}
        for node in wanted:
            try:
                features[node.name] = self._prepare_node(node, complete)
            except RecordError as error:
                rows = f" (rows count copies, {node.plate} a record)" if node.plate else ""
                raise RecordError(f"node {node.name!r}{rows}: {error}") from error
        return features

    def log_prob(self, params: Params, features: Mapping[str, Features], key: Keys) -> dict[str, Array]:
        """log p_k(v_k | parents) in nats of every node, `{node: Float[Array, "batch"]}`, without the nodes' weights."""
        self.check_params(params)
        return {
            node.name: self.node_log_prob(node, params.get(node.params_key, {}), features[node.name], key)[0]
            for node in self.nodes
        }

    def node_log_prob(
        self, node: Node, params: Params, features: Features, key: Keys
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """One node's log-probability, summed over its plate, and its metrics, averaged over the plate.

        key: one for all rows, or one a row. A row's noise depends on the key, the row's number in the batch (or its own
        key) and the node's name only: policy and reference see the same.
        """
        keys = row_keys(key, jax.tree.leaves(features)[0].shape[0])
        keys = jax.vmap(_named_key, in_axes=(0, None))(keys, node.name)
        if node.plate is None:
            log_prob, metrics = node.component.log_prob_with_metrics(params, features, keys)
            return log_prob, dict(metrics)
        keys = jax.vmap(row_keys, in_axes=(0, None))(keys, node.plate).reshape(-1)
        folded = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), features)
        log_prob, metrics = node.component.log_prob_with_metrics(params, folded, keys)
        means = {name: value.reshape(-1, node.plate).mean(-1) for name, value in metrics.items()}
        return log_prob.reshape(-1, node.plate).sum(-1), means

    def sample(self, params: Params, inputs: Sequence[Record], key: PRNGKeyArray) -> list[dict[str, Any]]:
        """Run the whole system once for each row of inputs: records with the inputs and the value of every node."""
        self.check_params(params)
        for row, record in enumerate(inputs):
            _require(record, self.inputs, row, "input")
        columns: dict[str, list[Any]] = {name: [record[name] for record in inputs] for name in self.inputs}
        for node in self.nodes if inputs else ():
            columns[node.name] = self.sample_node(node, params, columns, key)
        return [{name: column[row] for name, column in columns.items()} for row in range(len(inputs))]

    def sample_node(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], key: PRNGKeyArray
    ) -> list[Any]:
        """One node's value for every row of the columns `{name: values}`, which hold at least its parents."""
        parents, tree, node_key = self._parents_and_params(node, params, columns, key)
        if node.plate is None:
            return node.component.sample(tree, parents, node_key)
        if node.deterministic and not any(self._is_plate(name) for name in node.parents):
            values = [list(value) for value in node.component.sample(tree, parents, node_key)]
            for row, value in enumerate(values):
                _check_length(value, node, row)
            return values
        flat = node.component.sample(tree, self._unfold(node, parents), node_key)
        return [list(flat[i : i + node.plate]) for i in range(0, len(flat), node.plate)]

    def node_candidates(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], number: int, key: PRNGKeyArray
    ) -> list[list[Any]]:
        """From 1 to `number` distinct likely values of a node for every row of the columns, see `Component.candidates`.

        Of a plate those combinations of the copies' candidates whose ranks have the smallest sums.
        """
        parents, tree, node_key = self._parents_and_params(node, params, columns, key)
        if node.plate is None:
            return node.component.candidates(tree, parents, number, node_key)
        flat = node.component.candidates(tree, self._unfold(node, parents), number, node_key)
        plates = [flat[i : i + node.plate] for i in range(0, len(flat), node.plate)]
        return [
            [[c[i] for c, i in zip(copies, ranks, strict=True)] for ranks in _by_rank([*map(len, copies)], number)]
            for copies in plates
        ]

    def _parents_and_params(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], key: PRNGKeyArray
    ) -> tuple[dict[str, Sequence[Any]], Params, PRNGKeyArray]:
        parents = {name: columns[name] for name in node.parents}
        return parents, params.get(node.params_key, {}), _named_key(key, node.name)

    def describe(self) -> str:
        """The graph as Mermaid text: boxes are inputs, rounded boxes components, hexagons tools."""
        lines = ["graph LR", *(f"    {name}[{name}]" for name in self.inputs)]
        for node in self.nodes:
            plate = f" x{node.plate}" if node.plate else ""
            left, right = ("{{", "}}") if node.deterministic else ("(", ")")
            shared = "" if node.params_key == node.name or node.deterministic else f", params {node.params_key}"
            lines.append(f'    {node.name}{left}"{node.name}{plate}: {type(node.component).__name__}{shared}"{right}')
            lines.extend(f"    {parent} --> {node.name}" for parent in node.parents)
        return "\n".join(lines)

    def check_params(self, params: Params) -> None:
        """Raise `ValueError` naming the trees that are missing from or unknown to `{params_key: tree}`."""
        missing, unknown = set(self.param_keys) - set(params), set(params) - set(self.param_keys)
        if missing or unknown:
            raise ValueError(
                f"the parameters do not fit the system: missing {sorted(missing)}, unknown {sorted(unknown)}; "
                f"expected the keys {list(self.param_keys)}, as system.init returns them"
            )

    def _with_ancestors(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """The nodes and all that they depend on, in topological order."""
        names = {node.name for node in nodes}
        for node in reversed(self.nodes):
            if node.name in names:
                names.update(node.parents)
        return tuple(node for node in self.nodes if node.name in names)

    def _complete(self, record: Record, row: int, nodes: Sequence[Node]) -> dict[str, Any]:
        """The record with the values of tools among the nodes filled in."""
        _require(record, self.inputs, row, "input")
        values = dict(record)
        for node in nodes:
            if node.name not in values and node.deterministic:
                columns = {name: [values[name]] for name in node.parents}
                values[node.name] = self.sample_node(node, {}, columns, jax.random.key(0))[0]
            _require(values, (node.name,), row, "node")
            if node.plate is not None:
                _check_length(values[node.name], node, row)
        return values

    def _prepare_node(self, node: Node, records: Sequence[Record]) -> Features:
        columns = {name: [record[name] for record in records] for name in (*node.parents, node.name)}
        values = columns.pop(node.name)
        if node.plate is None:
            return node.component.prepare(values, columns)
        flat = [value for row in values for value in row]
        features = node.component.prepare(flat, self._unfold(node, columns))
        return jax.tree.map(lambda x: np.reshape(x, (len(values), node.plate, *x.shape[1:])), features)

    def _unfold(self, node: Node, parents: Parents) -> dict[str, list[Any]]:
        """One row a copy: plated parents give each copy its element, the others the same value to all."""
        copies = node.plate or 1
        spread: Callable[[str, Any], Sequence[Any]] = lambda name, v: v if self._is_plate(name) else [v] * copies  # noqa: E731
        return {name: [x for value in column for x in spread(name, value)] for name, column in parents.items()}

    def _is_plate(self, name: str) -> bool:
        return name not in self.inputs and self.node(name).plate is not None


def _by_rank(sizes: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """The first `number` of all tuples with 0 <= t[i] < sizes[i], by their sum."""
    found: list[tuple[int, ...]] = []
    level = {(0,) * len(sizes)}
    while level and len(found) < number:
        found += sorted(level)
        longer = ((*t[:i], t[i] + 1, *t[i + 1 :]) for t in level for i in range(len(sizes)))
        level = {t for t in longer if all(rank < size for rank, size in zip(t, sizes, strict=True))}
    return found[:number]


def _named_key(key: Keys, name: str) -> PRNGKeyArray:
    """A key that depends on the name alone, so that adding a node does not change another's noise."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))


def _require(record: Record, names: Sequence[str], row: int, kind: str) -> None:
    for name in names:
        if name not in record:
            raise RecordError(
                f"record {row} lacks a value for the {kind} {name!r} (it has {', '.join(record) or 'nothing'}): "
                "add the field or take the name out of the system"
            )


def _check_length(value: Any, node: Node, row: int) -> None:
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != node.plate:
        found = (
            f"{len(value)} values" if hasattr(value, "__len__") and not isinstance(value, str) else type(value).__name__
        )
        raise RecordError(f"record {row}: node {node.name!r} is a plate of {node.plate}, got {found}")


def _check_names(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> None:
    seen: set[str] = set()
    for name in (*inputs, *(node.name for node in nodes)):
        if name in seen:
            raise GraphError(f"the name {name!r} is used twice: every input and node needs a name of its own")
        seen.add(name)
    for node in nodes:
        for parent in node.parents:
            if parent not in seen:
                raise GraphError(
                    f"node {node.name!r} has an unknown parent {parent!r}: add a node or an input of that name"
                )
        if node.plate is not None and node.plate < 1:
            raise GraphError(f"node {node.name!r} has plate={node.plate}: it needs at least one copy")
    read = {parent for node in nodes for parent in node.parents}
    for name in inputs:
        if name not in read:
            raise GraphError(f"no node reads the input {name!r}: name it among a node's parents or take it out")


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


def _check_plates(nodes: tuple[Node, ...]) -> None:
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


def _check_static(nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        found = unhashable(node.component, type(node.component).__name__)
        if found is not None:
            raise GraphError(
                f"the component of node {node.name!r} cannot be hashed because of {found}: a system is static, so give "
                "tuples instead of lists, and keep arrays in the parameters"
            )
