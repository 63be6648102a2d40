"""What an objective is: a function of a system's parameters and a batch that gives a loss and what goes with it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.typing import Keys, Params


class Aux(NamedTuple):
    """What an objective returns beside its loss. All are means over the rows: those of parts of a batch are averaged.

    Attributes:
        terms: `{node: mean margin of its reward}`, which the step computes with: each node's share of the margin, and
            the node to blame for a value that is not finite; empty for an objective without such a split.
        metrics: `{name: scalar}`, which is logged; nothing is computed from it.
    """

    terms: Mapping[str, Float[Array, ""]]
    metrics: Mapping[str, Float[Array, ""]]


# (system, params, reference, batch, key) -> (loss, Aux), with the parameters and the reference as `{params_key: tree}`.
Objective: TypeAlias = Callable[[CompoundSystem, Params, Params, Any, Keys], tuple[Float[Array, ""], Aux]]


def margin_shares(terms: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """`{node: |its margin| over the sum of these}`: 0 while no node has a margin.

    terms: of a whole batch, because shares of its parts do not average to its own.
    """
    sizes = {name: jnp.abs(margin) for name, margin in terms.items()}
    whole = sum(sizes.values(), start=jnp.zeros(()))
    return {name: jnp.where(whole > 0, size / whole, 0) for name, size in sizes.items()}
