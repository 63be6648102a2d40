"""What a step takes: preferences as features, ready for an objective."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sysdpo_jax.components.routed import Routed
from sysdpo_jax.graph import CompoundSystem, encode_sides
from sysdpo_jax.typing import Features, Params


class PairBatch(NamedTuple):
    """Preferences for the step: two feature trees, as `CompoundSystem.prepare` and then `encode` return them.

    Attributes:
        chosen: `{node: features}` of the preferred runs, every array with a leading batch axis.
        rejected: The same of the runs that lost.
        reference: `{node: (chosen, rejected)}` in nats, each [batch], of nodes whose reference was evaluated before,
            see `precompute_reference`.
    """

    chosen: Features
    rejected: Features
    reference: Mapping[str, tuple[Any, Any]] | None = None

    def sides(self) -> Features:
        """Both sides in one tree.

        Returns:
            The features, every array [batch, 2, ...] with the chosen side first.
        """
        return jax.tree.map(lambda *sides: jnp.stack(sides, axis=1), self.chosen, self.rejected)


class SampledBatch(NamedTuple):
    """Preferences on outputs alone, ready for the step: both sides with the same M intermediates a row.

    Attributes:
        intermediates: `{node: features [batch, M, ...]}`, see `CompoundSystem.intermediates`.
        outputs: The same of the final nodes, for both sides.
        valid: bool [batch, M], at least one True a row; the others repeat a valid one and have no weight.
        staleness: int32 [batch], how many steps ago the policy drew the row's intermediates.
    """

    intermediates: Features
    outputs: PairBatch
    valid: Array | np.ndarray
    staleness: Array | np.ndarray


def share(
    system: CompoundSystem, runs: Sequence[Mapping[str, Features]], names: Sequence[str] | None = None
) -> list[dict[str, Features]]:
    """Mark what the runs of preferences have in common, see `Component.mark_shared`.

    Args:
        system: Whose components look for it.
        runs: `{node: features}` each, every array with a first axis of preferences.
        names: Of the nodes to look at, by default all.

    Returns:
        The same, ready for a batch.
    """
    made = [dict(run) for run in runs]
    for node in system.nodes:
        if isinstance(made[0].get(node.name), Routed):
            # The rows of a preference that are computed are not always the same number, nor do they lie together.
            continue
        if node.name in made[0] and not node.deterministic and (names is None or node.name in names):
            found = node.component.mark_shared([run[node.name] for run in made])
            for run, features in zip(made, found, strict=True):
                run[node.name] = features
    return made


def encode_batch(system: CompoundSystem, params: Params, batch: Any) -> Any:
    """Encode a batch's raw features, see `CompoundSystem.encode`.

    Args:
        system: Whose frozen parts encode.
        params: `{params_key: tree}`, `CompoundSystem.frozen_params` at least.
        batch: A `PairBatch` or a `SampledBatch`; any other comes back as it is.

    Returns:
        The batch as a step takes it.
    """
    if not system.encodes:
        return batch
    match batch:
        case PairBatch():
            chosen, rejected = encode_sides(system.nodes, params, [batch.chosen, batch.rejected])
            return batch._replace(chosen=chosen, rejected=rejected)
        case SampledBatch():
            outputs = encode_batch(system, params, batch.outputs)
            return batch._replace(intermediates=system.encode(params, batch.intermediates), outputs=outputs)
    return batch
