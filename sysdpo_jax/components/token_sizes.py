"""The sizes of features of texts: how long prompts and completions are, and features with other room for them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from sysdpo_jax.typing import Features


def sizes_of(features: Features) -> dict[str, Int[np.ndarray, "..."]]:
    """The numbers of tokens of "prompt" and "completion"; what is "shared" is not counted in the prompt again."""
    starts, lengths = (np.asarray(features[name]) for name in ("prompt_lengths", "lengths"))
    own = {"prompt": starts, "completion": lengths - starts}
    if "shared" in features:
        shared = np.sum(features["shared"], axis=-1)
        own |= {"shared": shared, "prompt": starts - shared}
    return {name: np.asarray(size) for name, size in own.items()}


def resized(features: Features, rooms: Mapping[str, int], pad: int) -> Features:
    """The features with room for so many tokens of each of `rooms`, filled up with `pad`. Raises `ValueError`."""
    own = sizes_of(features)
    for name, room in rooms.items():
        longest = int(own[name].max(initial=0))
        if longest > room:
            raise ValueError(f"LanguageModel: a {name} has {longest} tokens, more than the {room} of its new size")
    kept = _fitted(np.asarray(features["tokens"]), sum(rooms.values()), pad)
    # What a row begins with is a mask of its own; of tokens that follow a prompt at once it follows from their number.
    whole = {name: np.arange(room) < own[name][..., None] for name, room in rooms.items() if name != "prompt"}
    masks = {
        name: _fitted(np.asarray(features[name]), rooms[name]) if name in features else mask
        for name, mask in whole.items()
    }
    return features | {"tokens": kept} | masks


def _fitted(array: np.ndarray, width: int, filling: int = 0) -> np.ndarray:
    """The array with a last axis so wide, cut or filled up."""
    spare = max(0, width - array.shape[-1])
    return np.pad(array[..., :width], [(0, 0)] * (array.ndim - 1) + [(0, spare)], constant_values=filling)
