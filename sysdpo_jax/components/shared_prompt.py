"""What the texts of a preference have in common before their completions: found on the host, used in the step.

Features that are marked hold "shared" [..., S], True once for each token that all rows of a preference begin with; its
width is the room for them. Both sides of a pair share their prompt, as do all intermediates that were searched for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sysdpo_jax.models.shared_prefix import SharedPrefix, Sizes
from sysdpo_jax.typing import Features

# Fewer common tokens of prompts that differ are not worth a place of their own.
LEAST = 16
# The share of a step's tokens that must be saved: moving queries, keys and values takes a few per cent of a layer.
SAVING = 0.08


@jax.tree_util.register_static
@dataclass(frozen=True)
class Runs:
    """How many rows, one after the other, are of one preference."""

    number: int


def marked(runs: Sequence[Features]) -> list[Features]:
    """The runs with "shared", all of one room; each [preferences, ..., T].

    Of several preferences all or none share all of their prompts, and the room is that for prompts or 0: other batches
    get the same. Of a single one, whose size its caller chooses, what prompts that differ begin with counts too.
    """
    tokens = _together([run["tokens"] for run in runs])
    starts = _together([run["prompt_lengths"][..., None] for run in runs])[..., 0]
    common = np.minimum(_common(tokens), starts.min(1))
    # What completions leave of a row.
    room = min(run["tokens"].shape[-1] - run["completion"].shape[-1] for run in runs)
    whole = (common == starts.max(1)).all()
    if not whole:
        room = int(common[0]) if len(common) == 1 and common[0] >= LEAST else 0
        common = np.minimum(common, room)
    shared = np.arange(room) < common[:, None]

    def spread(run: Features) -> Features:
        leading = run["tokens"].shape[:-1]
        beside = shared.reshape(leading[0], *(1,) * (len(leading) - 1), room)
        return run | {"shared": np.broadcast_to(beside, (*leading, room))}

    return [spread(run) for run in runs]


def prefix_of(features: Features, longest: int) -> SharedPrefix | None:
    """How rows [rows, T] that `marked` and `Component.fold_runs` have seen are packed; None where that would not pay.

    longest: more tokens has no row, though T may have places for more.
    """
    runs, shared = features.get("runs"), features.get("shared")
    if runs is None or shared is None:
        return None
    number, (room, length) = runs.number, (shared.shape[-1], features["tokens"].shape[-1])
    if room * (number - 1) < SAVING * number * length or room == length:
        return None
    sizes = Sizes(number, room, length - room, min(length, longest))
    return SharedPrefix(jnp.sum(shared[::number], axis=-1), sizes)


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[preferences, ..., N] each as [preferences, rows, N] of all."""
    return np.concatenate([np.reshape(x, (len(x), np.prod(x.shape[1:-1], dtype=int), x.shape[-1])) for x in arrays], 1)


def _common(tokens: Int[np.ndarray, "preferences rows length"]) -> Int[np.ndarray, "preferences"]:
    """With how many equal tokens the rows of each preference begin."""
    alike = (tokens == tokens[:, :1]).all(1)
    return np.where(alike.all(1), alike.shape[1], np.argmin(alike, axis=1))
