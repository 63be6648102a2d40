"""The compound system: a directed acyclic graph of components.

p(s | x) = prod_k p_k(v_k | Pa(v_k)) (arXiv 2502.17721, section 3), so the system's log-probability is a sum over nodes.
A system is static: frozen, hashable, without arrays. Parameters are passed in, as `{params_key: tree}`.

Plates: a node with `plate=n` stands for n copies that share the parameters. Its value in a record is a list of n
values. A copy sees its own element of each parent that is a plate, and the whole of each parent that is not; a node
without a plate sees the whole list of a plated parent. Log-probabilities are summed over the plate.
"""

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.encoding import encode_together
from sysdpo_jax.components.tool import NotCalledError, ToolError, raise_first
from sysdpo_jax.keys import named_key, row_keys
from sysdpo_jax.structure import Graph, as_plate, by_rank, grouped, instead_of_plate, naming, users_part
from sysdpo_jax.structure import GraphError as GraphError
from sysdpo_jax.structure import Node as Node
from sysdpo_jax.typing import Features, Keys, Params, Parents, Record
from sysdpo_jax.values import Unequal, content_or_unequal

# What tools gave, by node and parents' values.
Known: TypeAlias = MutableMapping[tuple[str, Hashable], Any]


@jax.tree_util.register_static
@dataclass(frozen=True)
class CompoundSystem(Graph):
    """The nodes, sorted topologically, and the names of the inputs that they start from.

    Static in every jitted function that takes it: equal systems are one, whatever their parameters are.

    Args:
        inputs: Names of the values that a prompt holds.
        nodes: In any order.

    Raises:
        GraphError: For a duplicate name, an unknown parent, a cycle, plates that do not match, an unread input or a
            component that cannot be hashed.
    """

    def prepare(
        self, records: Sequence[Record], nodes: Sequence[str] | None = None, known: Known | None = None
    ) -> dict[str, Features]:
        """Turn raw records into arrays, on the host.

        Args:
            records: `{name: value}` of inputs and nodes. A tool's value may be missing: see `complete`.
            nodes: Names of the nodes to prepare, all of them by default.
            known: What tools gave before, see `complete`.

        Returns:
            `{node: features}`, every array with a leading batch axis.

        Raises:
            RecordError: Naming the row and the node, for a missing value, a plate of the wrong length or a tool that
                fails.
        """
        wanted = self.nodes if nodes is None else [self.node(name) for name in nodes]
        complete = self.complete(records, [node.name for node in wanted if not node.deterministic], known)
        raise_first(complete, "record")
        features = {}
        for node in wanted:
            try:
                features[node.name] = self._prepare_node(node, complete)
            except Exception as error:
                # Whatever a value leads a component into, the record is what cannot be used.
                said = str(error) if isinstance(error, RecordError) else f"{type(error).__name__}: {error}"
                rows = f" (rows count copies, {node.plate} a record)" if node.plate else ""
                raise RecordError(f"node {node.name!r}{rows}: {said}") from error
        return features

    def complete(self, records: Sequence[Record], nodes: Sequence[str], known: Known | None = None) -> list[Any]:
        """Fill in the values that records lack of tools which these nodes depend on, directly or not.

        A tool is called once for equal parents, so that tools whose values are not recorded must be deterministic.

        Args:
            records: `{name: value}` each.
            nodes: Names of nodes.
            known: What tools gave in earlier calls, which is not asked for again; what they give in this one is added.

        Returns:
            A record for each or, where a tool failed, the `ToolError`.

        Raises:
            RecordError: Naming the row and the node, for another value that is missing or a plate of the wrong length.
        """
        known = {} if known is None else known
        made: list[Any] = [dict(record) for record in records]
        for row, record in enumerate(records):
            _require(record, self.inputs, row, "input")
        for node in self.with_ancestors(nodes):
            lacking = [row for row in _alive(made) if node.deterministic and node.name not in made[row]]
            if lacking:
                columns = {name: [made[row][name] for row in lacking] for name in node.parents}
                for row, value in zip(lacking, self.tool_values(node, columns, known), strict=True):
                    made[row] = value if isinstance(value, ToolError) else made[row] | {node.name: value}
            for row in _alive(made):
                _require(made[row], (node.name,), row, "node")
                instead = None if node.plate is None else instead_of_plate(made[row][node.name], node.plate)
                if instead is not None:
                    raise RecordError(f"record {row}: node {node.name!r} is a plate of {node.plate}, got {instead}")
        return made

    @property
    def encodes(self) -> tuple[str, ...]:
        """The nodes whose components have frozen parts: what `prepare` makes of their values is still to be encoded."""
        return tuple(node.name for node in self.nodes if node.component.frozen)

    def frozen_params(self, params: Params) -> Params:
        """The entries of the parameters that are never trained.

        Args:
            params: `{params_key: tree}`.

        Returns:
            A tree of the same form with all that `encode` reads, and nothing else.
        """
        found: dict[str, Params] = {}
        for node in self.nodes:
            for name in node.component.frozen:
                found.setdefault(node.weights_key, {})[name] = params[node.weights_key][name]
        return found

    def encode(self, params: Params, features: Mapping[str, Features]) -> dict[str, Features]:
        """Encode by frozen parts what `prepare` made, NumPy in and out.

        What is equal (a caption, an image) is encoded once. What is encoded already, and what has nothing to encode,
        comes back as it is. Further axes may lie before the rows' own: plates, both sides of a pair, intermediates.

        Args:
            params: `frozen_params` at least, on one device or a mesh of this process. Of several processes each encodes
                its own rows, with what `replicate_per_process(system.frozen_params(params))` gives it.
            features: `{node: features}`.

        Returns:
            `{node: features}` as `log_prob` takes them.
        """
        return encode_sides(self.nodes, params, [features])[0]

    def log_prob(self, params: Params, features: Mapping[str, Features], key: Keys) -> dict[str, Array]:
        """log p_k(v_k | parents) of every node, without the nodes' weights.

        Args:
            params: `{params_key: tree}`.
            features: `{node: features}`, encoded.
            key: One for all rows, or one a row.

        Returns:
            `{node: Float[Array, "batch"]}` in nats.
        """
        self.check_params(params)
        return {
            node.name: self.node_log_prob(node, node.tree(params), features[node.name], key)[0] for node in self.nodes
        }

    def node_log_prob(
        self, node: Node, params: Params, features: Features, key: Keys
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """One node's log-probability, summed over its plate, and its metrics, averaged over the plate.

        Args:
            node: One of the system.
            params: The node's own tree.
            features: The node's own, encoded.
            key: One for all rows, or one a row. A row's noise depends on the key, the row's number in the batch (or its
                own key) and the node's name only: policy and reference see the same.

        Returns:
            The log-probability in nats and `{metric: value}`, one number a row each.
        """
        keys = row_keys(key, jax.tree.leaves(features)[0].shape[0])
        keys = jax.vmap(named_key, in_axes=(0, None))(keys, node.name)
        if node.plate is not None:
            keys = jax.vmap(row_keys, in_axes=(0, None))(keys, node.plate).reshape(-1)
            features = node.component.fold_runs(features, 2)
        with users_part(node, "log_prob", GraphError):
            log_prob, metrics = node.component.log_prob_with_metrics(params, features, keys)
        if node.plate is None:
            return log_prob, dict(metrics)
        means = {name: value.reshape(-1, node.plate).mean(-1) for name, value in metrics.items()}
        return log_prob.reshape(-1, node.plate).sum(-1), means

    def sample(self, params: Params, inputs: Sequence[Record], key: PRNGKeyArray) -> list[dict[str, Any]]:
        """Run the whole system once for each row of inputs.

        Args:
            params: `{params_key: tree}`.
            inputs: `{name: value}` each, of the system's inputs at least.
            key: Of which every node gets a part by its name.

        Returns:
            Records with the inputs and the value of every node.

        Raises:
            ToolError: Naming row and node where a tool fails, whatever its on_error.
        """
        runs = self.attempt(params, inputs, key)
        raise_first(runs, "row")
        return runs

    def attempt(self, params: Params, inputs: Sequence[Record | None], key: PRNGKeyArray) -> list[Any]:
        """`sample` that keeps what it can.

        Args:
            params: `{params_key: tree}`.
            inputs: As for `sample`. A row that is None keeps the size of a batch, and with it the draws of the others,
                as they would be with a row there. No tool is called for it.
            key: As for `sample`.

        Returns:
            For each row the run or, where a tool failed, the `ToolError`; None for None.
        """
        self.check_params(params)
        runs: list[Any] = [record if record is None else dict(record) for record in inputs]
        for row in _alive(runs):
            _require(runs[row], self.inputs, row, "input")
            runs[row] = {name: runs[row][name] for name in self.inputs}
        for node in self.nodes:
            alive = _alive(runs)
            if not alive:
                break
            if node.deterministic:
                columns = {name: [runs[row][name] for row in alive] for name in node.parents}
                values = dict(zip(alive, self.tool_values(node, columns), strict=True))
            else:
                # The last run stands in for those without one, whose draws are thrown away.
                rows = [run if row in alive else runs[alive[-1]] for row, run in enumerate(runs)]
                values = dict(enumerate(self.sample_node(node, params, _columns(rows, node.parents), key)))
            for row in alive:
                runs[row] = values[row] if isinstance(values[row], ToolError) else runs[row] | {node.name: values[row]}
        return runs

    def sample_node(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], key: PRNGKeyArray
    ) -> list[Any]:
        """Sample one generative node.

        Args:
            node: One of the system.
            params: `{params_key: tree}`.
            columns: `{name: values}`, which hold at least the node's parents.
            key: Of the whole run: the node's own follows from its name.

        Returns:
            A value for every row.

        Raises:
            RecordError: Naming the node.
        """
        rows = self._rows(node, columns)
        with naming(node), users_part(node, "sample", RecordError):
            made = node.component.sample(node.tree(params), rows, named_key(key, node.name))
            wanted = len(next(iter(rows.values())))
            if len(made) != wanted:
                raise RecordError(f"sample returned {len(made)} values for {wanted} rows: return one for each")
        return made if node.plate is None else grouped(made, node.plate)

    def tool_values(self, node: Node, columns: Mapping[str, Sequence[Any]], known: Known | None = None) -> list[Any]:
        """Call a node's tool.

        Args:
            node: One of the system.
            columns: `{name: values}`, which hold at least the node's parents.
            known: Where it is given, the tool is called once for equal parents, and not at all for those in it.

        Returns:
            A value for every row or, where the tool failed, the `ToolError`, which names the node.
        """
        parents = {name: columns[name] for name in node.parents}
        if known is None:
            return self._call(node, parents)
        keys = [(node.name, content_or_unequal(values)) for values in zip(*parents.values(), strict=True)]
        first = {key: row for row, key in reversed([*enumerate(keys)])}
        # In the order of the rows, the first of which to fail may stop the others.
        new = {key: first[key] for key in keys if key not in known}
        asked = {name: [column[row] for row in new.values()] for name, column in parents.items()}
        answers = dict(zip(new, self._call(node, asked), strict=True)) if new else {}
        for key, value in answers.items():
            if not isinstance(value, NotCalledError) and not isinstance(key[1], Unequal):
                known[key] = value
        return [known[key] if key in known else answers[key] for key in keys]

    def node_candidates(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], number: int, key: PRNGKeyArray
    ) -> list[list[Any]]:
        """Find distinct likely values of one generative node, see `Component.candidates`.

        Args:
            node: One of the system.
            params: `{params_key: tree}`.
            columns: `{name: values}`, which hold at least the node's parents.
            number: How many are wanted.
            key: Of the whole run.

        Returns:
            From 1 to `number` values for every row. Of a plate those combinations of the copies' candidates whose ranks
            have the smallest sums.

        Raises:
            RecordError: Naming the node.
        """
        rows = self._rows(node, columns)
        with naming(node), users_part(node, "candidates", RecordError):
            flat = node.component.candidates(node.tree(params), rows, number, named_key(key, node.name))
        if node.plate is None:
            return flat
        plates = grouped(flat, node.plate)
        return [
            [[c[i] for c, i in zip(copies, ranks, strict=True)] for ranks in by_rank([*map(len, copies)], number)]
            for copies in plates
        ]

    def _call(self, node: Node, parents: Parents) -> list[Any]:
        """What the tool of a node gives for every row, or the `ToolError`; of a plate all the copies' values."""
        tool: Any = node.component
        if node.plate is None:
            made = tool.outcomes(parents)
        elif any(self._is_plate(name) for name in node.parents):
            copies = grouped(tool.outcomes(self._rows(node, parents)), node.plate)
            # One copy without a value leaves the run without one.
            made = [next((x for x in row if isinstance(x, ToolError)), row) for row in copies]
        else:
            made = [as_plate(value, tool, node.plate) for value in tool.outcomes(parents)]
        return [x.at(f"node {node.name!r}") if isinstance(x, ToolError) else x for x in made]

    def _prepare_node(self, node: Node, records: Sequence[Record]) -> Features:
        if node.deterministic:
            # It has no part in the loss, and its value is not needed.
            copies = () if node.plate is None else (node.plate,)
            return np.zeros((len(records), *copies, 0), np.float32)
        columns = _columns(records, (*node.parents, node.name))
        values = columns[node.name]
        if node.plate is not None:
            values = [value for row in values for value in row]
        with users_part(node, "prepare", RecordError):
            features = node.component.prepare(values, self._rows(node, columns))
        if node.plate is None:
            return features
        return jax.tree.map(lambda x: np.reshape(x, (len(records), node.plate, *x.shape[1:])), features)

    def _rows(self, node: Node, columns: Parents) -> dict[str, Sequence[Any]]:
        """The parents' values, one row a copy: plates give each copy its element, others the same value to all."""
        copies = node.plate
        if copies is None:
            return {name: columns[name] for name in node.parents}
        spread = lambda name, v: v if self._is_plate(name) else [v] * copies  # noqa: E731
        return {name: [x for value in columns[name] for x in spread(name, value)] for name in node.parents}

    def _is_plate(self, name: str) -> bool:
        return name not in self.inputs and self.node(name).plate is not None


def _require(record: Record, names: Sequence[str], row: int, kind: str) -> None:
    for name in names:
        if name not in record:
            raise RecordError(
                f"record {row} lacks a value for the {kind} {name!r} (it has {', '.join(record) or 'nothing'}): "
                "add the field or take the name out of the system"
            )


def _columns(rows: Sequence[Record], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def _alive(runs: Sequence[Any]) -> list[int]:
    """The rows that have a run, and neither nothing nor a `ToolError`."""
    return [row for row, run in enumerate(runs) if isinstance(run, dict)]


def encode_sides(
    nodes: Iterable[Node], params: Params, sides: Sequence[Mapping[str, Features]]
) -> list[dict[str, Features]]:
    """The encoded features of each of several `{node: features}`, see `CompoundSystem.encode`."""
    made: list[dict[str, Features]] = [dict(side) for side in sides]
    for node in nodes:
        places = [place for place, side in enumerate(sides) if node.component.frozen and node.name in side]
        if places:
            with users_part(node, "encode", GraphError):
                features = [sides[place][node.name] for place in places]
                encoded = encode_together(node.component, params[node.weights_key], features)
            for place, entry in zip(places, encoded, strict=True):
                made[place][node.name] = entry
    return made
