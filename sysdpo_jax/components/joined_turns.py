"""Turns of a conversation in one row: what a model said in each, and between it what it was told.

The tokens of a turn, prompt and completion, are often what the prompt of the next turn begins with. One row then holds
both turns, and the dense layers and attention go over each token once: a causal model gives the tokens of the earlier
turn the very log-probabilities that they have alone.
"""

import numpy as np
from jaxtyping import Bool

from sysdpo_jax.typing import Features


def joined(
    features: Features, ran: Bool[np.ndarray, "records turns"], room: int
) -> tuple[Features, Bool[np.ndarray, "records turns"]]:
    """Features of `LanguageModel.prepare`, [records, turns, ...], with each turn in the row of the next that holds it.

    Such a row has the first turn's prompt; "completion" is True on what the model said, and False on what it was told
    in between. "turns" is how many turns a row holds, 0 for one that has been joined to another or did not run.
    room: for all tokens of a row, which that for completions becomes.
    """
    tokens, starts, lengths = (np.array(features[name]) for name in ("tokens", "prompt_lengths", "lengths"))
    places, left, held = np.arange(tokens.shape[-1]), np.array(ran), np.array(ran, np.int32)
    # What the model said, by place of the row.
    said = (places >= starts[..., None]) & (places < lengths[..., None])
    noted = {name: np.array(features[name]) for name in ("truncated", "retokenized")}
    for turn in range(1, ran.shape[1]):
        last = turn - 1
        alike = (tokens[:, last] == tokens[:, turn]) | (places >= lengths[:, last, None])
        fits = left[:, last] & left[:, turn] & (lengths[:, last] <= starts[:, turn]) & alike.all(-1)
        said[:, turn] |= said[:, last] & fits[:, None]
        starts[:, turn] = np.where(fits, starts[:, last], starts[:, turn])
        held[:, turn] += held[:, last] * fits
        for values in noted.values():
            values[:, turn] = np.where(fits, np.maximum(values[:, last], values[:, turn]), values[:, turn])
        left[:, last] &= ~fits
    held *= left
    spare = [(0, 0)] * 2
    # Behind the end of a row nothing was said.
    behind = np.minimum(starts[..., None] + np.arange(room), tokens.shape[-1])
    completion = np.take_along_axis(np.pad(said, [*spare, (0, 1)]), behind, axis=-1)
    # As everywhere, a row has room for a prompt and for a completion.
    wide = max(0, room - features["completion"].shape[-1])
    made = {"tokens": np.pad(tokens, [*spare, (0, wide)]), "prompt_lengths": starts, "lengths": lengths}
    return features | made | noted | {"completion": completion, "turns": held.astype(np.float32)}, left
