"""A decoder as the loops of decoding call it: prompts in, then a token of every row at a time, with one cache.

Axes: B batch, P padded prompt length, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from sysdpo_jax.models.cached_attention import laid_out
from sysdpo_jax.models.decoder import KEPT, Decoder, KVCache

Prompts = Int[Array | np.ndarray, "batch prompt"]
Lengths = Int[Array | np.ndarray, " batch"]

# With other numbers of slots the fastest products would first copy the cache, to pad it.
MULTIPLE = 8


@dataclass(frozen=True)
class CachedModel:
    """All that the compiled loops depend on beside shapes."""

    decoder: Decoder
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    pad_token: int

    def check(self, caller: str, prompts: Prompts, prompt_lengths: Lengths) -> None:
        """Raises the ValueErrors of `generate` on prompts and lengths, in the name of the caller."""
        room, longest = self.decoder.config.max_position_embeddings, prompts.shape[1]
        if self.max_new_tokens < 1 or longest + self.max_new_tokens > room:
            raise ValueError(
                f"{caller}: max_new_tokens {self.max_new_tokens} must be at least 1 and, after prompts of "
                f"{longest} tokens, fit in max_position_embeddings {room}."
            )
        # A device array may be traced or spread over hosts, so only host arrays can be checked.
        if isinstance(prompt_lengths, np.ndarray) and np.any((prompt_lengths < 1) | (prompt_lengths > longest)):
            raise ValueError(
                f"{caller}: prompt_lengths must lie in [1, {longest}], got {prompt_lengths.tolist()}; "
                "an empty prompt needs at least a start token."
            )

    def slots(self, needed: int, beside: int = 0) -> int:
        """So many that matrix products read whole vectors of them, where the model has the positions, some used."""
        left = self.decoder.config.max_position_embeddings - beside
        return max(needed, min(-(-needed // MULTIPLE) * MULTIPLE, left))

    def prefill(self, params: PyTree, prompts: Prompts, lengths: Lengths, spare: int) -> tuple[Array, KVCache]:
        """Logits [B, V] of the first new token, and the cache of the prompts with so many spare slots behind.

        The prompts run as in training: padding on the right is behind what any real token sees, and hidden later.
        """
        batch, prompt = prompts.shape
        hidden, kept = self.decoder.apply({"params": params}, prompts, method="hidden_states", mutable=[KEPT])
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        stacks = kept[KEPT]["layers"]["self_attn"]

        def layers(stack: Array) -> tuple[Array, ...]:
            room = ((0, 0), (0, 0), (0, spare), (0, 0))
            return tuple(jnp.pad(laid_out(stack[number]), room) for number in range(len(stack)))

        slots = jnp.broadcast_to(jnp.arange(prompt + spare), (batch, prompt + spare))
        cache = KVCache(layers(stacks["keys"]), layers(stacks["values"]), slots < lengths[:, None], slots)
        return self._run(params, "head", last)[:, 0], cache

    def extend(
        self,
        params: PyTree,
        tokens: Array,
        cache: KVCache,
        slot: Array,
        at: Lengths,
        mask: Array | None = None,
        shared: KVCache | None = None,
    ) -> tuple[Array, KVCache]:
        """Logits [rows, V] after one more token [rows] of each row, put at a slot of the cache and a position `at`."""
        hidden, cache = self._run(params, "extend", tokens[:, None], cache, slot, at[:, None], mask, shared)
        return self._run(params, "head", hidden)[:, 0], cache

    def _run(self, params: PyTree, method: str, *inputs: Any) -> Any:
        return self.decoder.apply({"params": params}, *inputs, method=method)
