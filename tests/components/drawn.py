"""Parameters of a component, a system or a model without its initialisation, whose compilation takes seconds."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def drawn(init: Callable[[Any], Any], seed: int = 0) -> Any:
    """What `init(key)` would give, with other numbers: NumPy's, of like sizes; scales of norms are 1, biases 0."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name, one = path[-1].key, like.ndim == 1
        if one and name in ("scale", "weight", "bias"):
            return jax.device_put(np.full(like.shape, name != "bias", like.dtype))
        width = like.shape[-1] if name == "embedding" or one else np.prod(like.shape[:-1])
        return jax.device_put((rng.normal(size=like.shape) / np.sqrt(width)).astype(like.dtype))

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, jax.random.key(0)))
