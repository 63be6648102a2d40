"""The compound system: a directed acyclic graph of components.

p(s | x) = prod_k p_k(v_k | Pa(v_k)) (arXiv 2502.17721, section 3), so the system's log-probability is a sum over nodes.
A system is static: frozen, hashable, without arrays. Parameters are passed in, as `{params_key: tree}`.

Plates: a node with `plate=n` stands for n copies that share the parameters. Its value in a record is a list of n
values. A copy sees its own element of each parent that is a plate, and the whole of each parent that is not; a node
without a plate sees the whole list of a plated parent. Log-probabilities are summed over the plate.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.encoding import encode_together
from sysdpo_jax.components.routed import Routed, compacted, spread, summed
from sysdpo_jax.components.tool import raise_first
from sysdpo_jax.keys import named_key, row_keys
from sysdpo_jax.nodes import GraphError as GraphError
from sysdpo_jax.nodes import Loop as Loop
from sysdpo_jax.nodes import Node as Node
from sysdpo_jax.nodes import users_part
from sysdpo_jax.running import Known as Known
from sysdpo_jax.running import Running, columns_of
from sysdpo_jax.typing import Features, Keys, Params, Record


@jax.tree_util.register_static
@dataclass(frozen=True)
class CompoundSystem(Running):
    """The nodes, sorted topologically, and the names of the inputs that they start from.

    Static in every jitted function that takes it: equal systems are one, whatever their parameters are.

    Args:
        inputs: Names of the values that a prompt holds.
        nodes: In any order, loops among them.

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
                counted = [f"copies, {node.plate} a record"] if node.plate else []
                counted += ["its runs"] if self.is_routed(node) else []
                rows = f" (rows count {' of '.join(counted)})" if counted else ""
                raise RecordError(f"node {node.name!r}{rows}: {said}") from error
        return features

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
        """One node's log-probability, summed over its plate and its runs in a row, and its metrics.

        Of a node that does not run in every row the runs alone are computed.

        Args:
            node: One of the system.
            params: The node's own tree.
            features: The node's own, encoded.
            key: One for all rows, or one a row. A row's noise depends on the key, the row's number in the batch (or its
                own key), the turn's and the node's name only: policy and reference see the same.

        Returns:
            The log-probability in nats and `{metric: value}`, one number a row each: metrics are averaged over the
            plate, and summed over the runs of a row.
        """
        keys = row_keys(key, jax.tree.leaves(features)[0].shape[0])
        if isinstance(features, Routed):
            return self._routed_log_prob(node, params, features, keys)
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

    def _routed_log_prob(
        self, node: Node, params: Params, routed: Routed, keys: Keys
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        if routed.features is None:
            return jnp.zeros(routed.ran.shape[0]), {}
        if routed.ran.ndim > 1:
            keys = jax.vmap(row_keys, in_axes=(0, None))(keys, routed.ran.shape[1]).reshape(-1)
        features, source, target = compacted(routed)
        made = self.node_log_prob(node, params, features, keys[source])
        found: tuple[Array, dict[str, Array]] = jax.tree.map(lambda x: summed(x, target, routed.ran), made)
        return found

    def _prepare_node(self, node: Node, records: Sequence[Record]) -> Features:
        if not node.has_params:
            # It has no part in the loss, and its value is not needed.
            copies = () if node.plate is None else (node.plate,)
            return np.zeros((len(records), *copies, 0), np.float32)
        if not self.is_routed(node):
            return self._prepare_runs(node, records)
        ran, runs = self._runs_of(node, records)
        if not runs:
            return Routed(None, ran)
        features = spread(self._prepare_runs(node, runs), ran)
        if node.loop is not None and node.plate is None:
            with users_part(node, "join_turns", RecordError):
                features, ran = node.component.join_turns(features, ran)
        return Routed(features, ran)

    def _runs_of(self, node: Node, records: Sequence[Record]) -> tuple[np.ndarray, list[Record]]:
        """Which places of the records have a run of a node, and the values that each of these sees, in this order."""
        if node.loop is None:
            ran = np.array([self.flow.runs(node.name, record) for record in records], bool)
            return ran, [record for record, own in zip(records, ran, strict=True) if own]
        loop, most = node.loop, self.most_turns(node.loop)
        ran, runs = np.zeros((len(records), most), bool), list[Record]()
        for row, record in enumerate(records):
            for number, turn in enumerate(record.get(loop, ())):
                view = {**record, **turn, loop: list(record[loop][:number])}
                if self.bodies[loop].runs(node.name, view):
                    ran[row, number] = True
                    runs.append(view)
        return ran, runs

    def _prepare_runs(self, node: Node, records: Sequence[Record]) -> Features:
        columns = columns_of(records, (*node.parents, node.name))
        values = columns[node.name]
        if node.plate is not None:
            values = [value for row in values for value in row]
        with users_part(node, "prepare", RecordError):
            features = node.component.prepare(values, self._rows(node, columns))
        if node.plate is None:
            return features
        return jax.tree.map(lambda x: np.reshape(x, (len(records), node.plate, *x.shape[1:])), features)


def encode_sides(
    nodes: Iterable[Node], params: Params, sides: Sequence[Mapping[str, Features]]
) -> list[dict[str, Features]]:
    """The encoded features of each of several `{node: features}`, see `CompoundSystem.encode`."""
    made: list[dict[str, Features]] = [dict(side) for side in sides]
    for node in nodes:
        own = {
            place: side[node.name] for place, side in enumerate(sides) if node.component.frozen and node.name in side
        }
        # Of a node that ran in no row there is nothing to encode.
        own = {
            place: entry for place, entry in own.items() if not (isinstance(entry, Routed) and entry.features is None)
        }
        if own:
            with users_part(node, "encode", GraphError):
                features = [entry.features if isinstance(entry, Routed) else entry for entry in own.values()]
                encoded = encode_together(node.component, params[node.weights_key], features)
            for (place, entry), new in zip(own.items(), encoded, strict=True):
                made[place][node.name] = replace(entry, features=new) if isinstance(entry, Routed) else new
    return made
