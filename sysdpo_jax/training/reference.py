"""Reference log-probabilities computed once, before training, so that the reference's weights need no memory in it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components.routed import Routed
from sysdpo_jax.data.records import SIDES
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.io import read_arrays, write_arrays
from sysdpo_jax.manifest import describe, digest, fingerprints
from sysdpo_jax.parallel.sharding import activation_rules, batch_parts, make_mesh, place_batch
from sysdpo_jax.training.compiling import COMPILER_OPTIONS
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Features, Params

# (features, key) -> [rows], of a node under the reference.
LogProb: TypeAlias = Callable[[Any, PRNGKeyArray], Array]


def precompute_reference(
    system: CompoundSystem,
    reference: Params,
    pairs: PairBatch,
    keys: Sequence[str],
    directory: str | Path | None = None,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> PairBatch:
    """Evaluate the reference once, for pairs that are seen often.

    Give `create_state` the same keys as `precomputed`, and drop your own `reference` to free its memory. The values
    agree with those of the training step up to rounding, because a forward pass alone compiles to other sums. A
    checkpoint does not know what a freed reference was: give `Trainer(config=...)` something that names it.

    Args:
        system: The graph.
        reference: `{params_key: tree}`, on the mesh; with the bases of roles.
        pairs: NumPy arrays of `prepare_pairs`, whole.
        keys: Params keys: of whose nodes.
        directory: Keeps the values, a file for each node, named by a hash of the data (token ids, so the tokenizer as
            well), the weights and the node; a second call reads it.
        batch_size: Rows of one forward pass.
        mesh: By default one device.

    Returns:
        `pairs` with the log-probabilities in nats, under `reference`, of these nodes.

    Raises:
        ValueError: For a key of no node, a node that draws noise (its reference must see the noise of each step), and
            in several processes where a file is missing.
    """
    mesh = make_mesh() if mesh is None else mesh
    unknown = set(keys) - set(system.param_keys)
    if unknown:
        raise ValueError(f"no node has the params key {sorted(unknown)[0]!r}; there are {', '.join(system.param_keys)}")
    nodes = [node for node in system.nodes if node.params_key in keys and node.has_params]
    known = dict(pairs.reference or {})
    for node in nodes:
        params, sides = node.tree(reference), [side[node.name] for side in (pairs.chosen, pairs.rejected)]
        path = None if directory is None else Path(directory) / f"{node.name}-{_digest(node, params, sides)}.npz"
        if path is not None and path.exists():
            values = read_arrays(path, "remove it, and its values are made anew")
        elif jax.process_count() > 1:
            raise ValueError(
                f"precompute_reference evaluates in one process only, and has no file of the node {node.name!r} in "
                f"{directory}: call it with that directory in a process of its own first"
            )
        else:
            log_prob = partial(_log_prob, system, node, mesh, params)
            _refuse_noise(log_prob, node, sides[0], mesh)
            rows = [_log_probs(log_prob, side, batch_size, mesh) for side in sides]
            values = dict(zip(SIDES, rows, strict=True))
            if path is not None:
                write_arrays(path, values)
        chosen, rejected = (values[side] for side in SIDES)
        known[node.name] = chosen, rejected
    return pairs._replace(reference=known)


def _digest(node: Node, params: Params, sides: list[Features]) -> str:
    """A hash of what the values depend on, the same in every process."""
    arrays = [by_path(jax.tree.map(np.asarray, side)) for side in sides]
    return digest([describe("node", node), fingerprints(params), arrays])


def _log_probs(log_prob: LogProb, features: Features, batch_size: int, mesh: Mesh) -> Float[np.ndarray, "rows"]:
    rows = jax.tree.leaves(features)[0].shape[0]
    slices = []
    for start in range(0, rows, batch_size):
        # Padded with the last row, so that one shape is compiled.
        picked = np.minimum(np.arange(start, start + batch_size), rows - 1)
        part = place_batch(mesh, jax.tree.map(lambda x, picked=picked: x[picked], features))
        slices.append(np.asarray(log_prob(part, jax.random.key(0))))
    return np.concatenate(slices)[:rows].astype(np.float32)


def _refuse_noise(log_prob: LogProb, node: Node, features: Features, mesh: Mesh) -> None:
    row = 0
    if isinstance(features, Routed):
        # One that ran: the others have no noise.
        row = int(np.argmax(np.asarray(features.ran).reshape(len(features.ran), -1).any(axis=1)))
    one_row = jax.tree.map(lambda x: np.repeat(x[row : row + 1], batch_parts(mesh), axis=0), features)
    part = place_batch(mesh, one_row)
    one, other = (np.asarray(log_prob(part, jax.random.key(seed))) for seed in (0, 1))
    if not np.array_equal(one, other):
        raise ValueError(
            f"node {node.name!r} draws noise, so its reference must be evaluated in every step: leave "
            f"{node.params_key!r} out of the keys"
        )


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=COMPILER_OPTIONS)
def _log_prob(
    system: CompoundSystem, node: Node, mesh: Mesh, params: Params, features: Any, key: PRNGKeyArray
) -> Float[Array, "rows"]:
    with activation_rules(mesh):
        return system.node_log_prob(node, params, features, key)[0]
